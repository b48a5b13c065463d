//! What changed, told to whoever listens: one broadcast for everything, one latest value for each running migration.
//!
//! Nobody who publishes ever waits for a reader. A reader of everything who falls behind loses his backlog and is given the
//! whole again ([`crate::http`] does that); a reader of one migration sees its latest record, however many he missed. Nothing
//! here is durable: the records are in [`crate::store`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{broadcast, watch};
use whimbrel_api::MigrationId;
use whimbrel_api::event::Event;
use whimbrel_api::migration::Migration;

use crate::store::is_active;

/// Most events that a reader of everything may be behind.
const BACKLOG_EVENTS_MAX: usize = 256;

type Latest = watch::Sender<Arc<Migration>>;

/// The pool's bulletin.
#[derive(Debug)]
pub struct Events {
    all: broadcast::Sender<Arc<Event>>,
    running: Mutex<HashMap<MigrationId, Latest>>,
}

impl Default for Events {
    fn default() -> Self {
        let (all, _) = broadcast::channel(BACKLOG_EVENTS_MAX);
        Self { all, running: Mutex::default() }
    }
}

impl Events {
    /// Tells everybody. A migration's record that has ended ends its watchers too, after they have seen it.
    pub fn publish(&self, event: Event) {
        if let Event::Migration { migration } = &event {
            self.note_migration(migration);
        }
        // Without listeners there is nobody to tell.
        let _ = self.all.send(Arc::new(event));
    }

    fn note_migration(&self, migration: &Migration) {
        let latest = Arc::new(migration.clone());
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if is_active(&migration.state) {
            let sender =
                running.entry(migration.id).or_insert_with(|| watch::Sender::new(latest.clone()));
            sender.send_replace(latest);
        } else if let Some(sender) = running.remove(&migration.id) {
            sender.send_replace(latest);
        }
    }

    /// Everything from now on.
    pub(crate) fn subscribe(&self) -> broadcast::Receiver<Arc<Event>> {
        self.all.subscribe()
    }

    /// Follows a migration whose stored record is `record`: its latest state, then every change until it has ended.
    pub(crate) fn watch(&self, record: Migration) -> watch::Receiver<Arc<Migration>> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = running.get(&record.id) {
            return sender.subscribe();
        }
        let id = record.id;
        let active = is_active(&record.state);
        let (sender, receiver) = watch::channel(Arc::new(record));
        if active {
            running.insert(id, sender);
        }
        receiver
    }

    /// The latest record of a running migration, figures included that are not stored.
    pub(crate) fn latest(&self, id: MigrationId) -> Option<Migration> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.get(&id).map(|sender| sender.borrow().as_ref().clone())
    }
}
