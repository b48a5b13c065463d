//! Every other way of sending memory between real QEMUs, measuring, and states in files.

use std::fs::File;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::watch;
use whimbrel_qemu::machine::{DirtyRateMode, DirtyRateStatus, RunState};
use whimbrel_qemu::migrate::incoming::{self, IncomingSettings};
use whimbrel_qemu::migrate::outgoing::{self, Outgoing, OutgoingError, OutgoingSettings};
use whimbrel_qemu::migrate::state_file::{self, Layout, SaveError};
use whimbrel_qemu::migrate::{
    Compression, LiveChange, MAX_DOWNTIME_MS_MAX, Postcopy, Statistics, Stream, Throttle,
};

use crate::rig::{Guest, Lab, engines, listening, moved, pairs, soon, to};
use crate::tls::{client, server};

/// All that `query-migrate-parameters` and `query-migrate-capabilities` tell.
async fn settings_of(guest: &Guest) -> (Value, Value) {
    let qmp = guest.machine.qmp();
    let parameters = qmp.execute("query-migrate-parameters", Value::Null).await.unwrap();
    (parameters, qmp.execute("query-migrate-capabilities", Value::Null).await.unwrap())
}

#[tokio::test]
async fn memory_travels_compressed() {
    let multifd = Stream { multifd_channels: Some(3), ..Stream::default() };
    let single = Stream::default();
    let ways = [
        Stream { compression: Some(Compression::Zlib { level: 3 }), ..multifd },
        Stream { compression: Some(Compression::Zstd { level: 5 }), ..multifd },
        Stream { compression: Some(Compression::Xbzrle { cache_bytes: 32 << 20 }), ..single },
    ];
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let dirs = lab.tls(["host-a", "host-b", "host-c"]);
        let mut source = lab.start_running(&from, "source").await;
        let before =
            if from.fake { (Value::Null, Value::Null) } else { settings_of(&source).await };
        for (index, stream) in ways.into_iter().enumerate() {
            let name = format!("destination-{index}");
            let destination = lab.start(&onto, &name, true).await;
            let own = server(&dirs[1]);
            let settings = IncomingSettings { stream, ..listening(own) };
            let address = destination.listens_as(&settings).await;
            let own = client(&dirs[0], "host-b.qemu.whimbrel");
            let settings = OutgoingSettings {
                stream,
                throttle: Some(Throttle { initial_percent: 30, ..Throttle::default() }),
                ..to(address, own)
            };
            moved(&source, &destination, &settings).await;
            let figures = Statistics::query(source.machine.qmp()).await.unwrap();
            assert_eq!(figures.xbzrle.is_some(), stream.multifd_channels.is_none(), "{figures:?}");
            outgoing::reset(&source.machine).await.unwrap();
            if !from.fake && index == 0 {
                assert_eq!(settings_of(&source).await, before);
            }
            // A guest does not go back to an older QEMU here.
            if onto == from {
                destination.machine.cont().await.unwrap();
                source = destination;
            } else {
                source.machine.cont().await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn memory_is_sent_without_a_copy_where_it_may_be_locked() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let source = lab.start_running(&from, "source").await;
        // Needs more than being root where rights have been taken away.
        if source.process.allow_locked_memory(256 << 20).is_err() {
            continue;
        }
        let destination = lab.start(&onto, "destination", true).await;
        let stream = Stream { multifd_channels: Some(2), ..Stream::default() };
        let settings = IncomingSettings { stream, ..listening(None) };
        let address = destination.listens_as(&settings).await;
        let settings = OutgoingSettings { stream, zero_copy: true, ..to(address, None) };
        moved(&source, &destination, &settings).await;
    }
}

#[tokio::test]
async fn what_can_not_be_had_is_refused_before_anything_is_done() {
    for engine in engines() {
        let lab = Lab::new();
        let guest = lab.start_running(&engine, "web01").await;
        let address = "127.0.0.1:1".parse().unwrap();
        let postcopy = Some(Postcopy::default());
        let stream = Stream { multifd_channels: Some(2), postcopy, ..Stream::default() };
        let both = OutgoingSettings { stream, ..to(address, None) };
        let copyless = OutgoingSettings { zero_copy: true, ..to(address, None) };
        // 7.2 would take it, so it is not told; 10.0 says no by itself.
        let error = Outgoing::start(&guest.machine, &both).await.unwrap_err();
        let unasked = matches!(error, OutgoingError::Unsupported { .. });
        assert_eq!(unasked, engine.version == "7.2", "{error:?}");
        let refused = matches!(error, OutgoingError::Prepare { step: "capabilities", .. });
        assert!(unasked || refused, "{error:?}");
        let error = Outgoing::start(&guest.machine, &copyless).await.unwrap_err();
        assert!(matches!(error, OutgoingError::Unsupported { .. }), "{error:?}");
        let limited = OutgoingSettings {
            switchover_bandwidth_bytes_per_second: Some(1 << 30),
            ..to(address, None)
        };
        let error = Outgoing::start(&guest.machine, &limited).await.map(drop);
        assert_eq!(error.is_ok(), engine.version == "10.0", "{error:?}");
        let saved = File::create(lab.dir.path().join("state")).unwrap();
        let progress = watch::Sender::default();
        let saved = state_file::save(&guest.machine, &saved, Layout::Stream, &progress);
        let error = soon(saved).await.unwrap_err();
        assert!(matches!(error, SaveError::NotStopped { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn limits_change_while_a_guest_is_copied() {
    for (from, onto) in pairs() {
        let lab = Lab::new();
        let source = lab.start_writing(&from, "source").await;
        if from.fake {
            let path = format!("{}.faults", source.spec.qmp_socket.display());
            std::fs::write(path, "copying-ms=1000").unwrap();
        }
        let destination = lab.start_spec(&onto, lab.writer("destination", true)).await;
        let address = destination.listens(None).await;
        let slow =
            OutgoingSettings { max_bandwidth_bytes_per_second: 1 << 20, ..to(address, None) };
        let mut outgoing = Outgoing::start(&source.machine, &slow).await.unwrap();
        let control = outgoing.control();
        let progress = watch::Sender::default();
        let change = async {
            // As much as there is, and to the end now.
            let forced = LiveChange {
                max_downtime_ms: Some(MAX_DOWNTIME_MS_MAX),
                max_bandwidth_bytes_per_second: Some(0),
                ..LiveChange::default()
            };
            control.set_live(&forced).await.unwrap();
        };
        let (waited, ()) =
            soon(async { tokio::join!(outgoing.wait_pre_switchover(&progress), change) }).await;
        waited.unwrap();
        outgoing.continue_to_completed(Duration::from_secs(20)).await.unwrap();
        soon(incoming::wait_loaded(&destination.machine)).await.unwrap();
    }
}

#[tokio::test]
async fn the_rate_of_writing_is_measured() {
    for engine in engines() {
        let lab = Lab::new();
        let guest = lab.start_writing(&engine, "web01").await;
        let none = guest.machine.query_dirty_rate().await.unwrap();
        assert_eq!(none.status, DirtyRateStatus::Unstarted);
        let mode = DirtyRateMode::PageSampling { sample_pages: Some(1024) };
        guest.machine.calc_dirty_rate(Duration::from_secs(1), mode).await.unwrap();
        let measured = soon(async {
            loop {
                let rate = guest.machine.query_dirty_rate().await.unwrap();
                if rate.status == DirtyRateStatus::Measured {
                    return rate;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        // 10.0 tells how long it took.
        assert!((1000..1500).contains(&measured.period_ms.unwrap()), "{measured:?}");
        assert_eq!(measured.mode.as_deref(), Some(mode.as_wire()));
        let rate = measured.mebibytes_per_second.unwrap();
        assert!(engine.fake || (30..=100).contains(&rate), "{engine:?} {measured:?}");
        // Both would end 7.2 under TCG.
        for mode in [DirtyRateMode::DirtyBitmap, DirtyRateMode::DirtyRing] {
            let measuring = guest.machine.calc_dirty_rate(Duration::from_secs(1), mode);
            assert!(measuring.await.unwrap_err().is_refusal());
        }
    }
}

#[tokio::test]
async fn a_state_is_saved_and_restored() {
    for (from, onto) in pairs() {
        let able = |engine: &crate::rig::Engine| engine.version == "10.0";
        let mut layouts = vec![Layout::Stream];
        if able(&from) && able(&onto) {
            layouts
                .extend([Layout::Mapped { channels: None }, Layout::Mapped { channels: Some(2) }]);
        }
        for layout in layouts {
            let lab = Lab::new();
            let source = lab.start_writing(&from, "source").await;
            source.machine.stop().await.unwrap();
            let rounds = if from.fake { 0 } else { source.rounds_beyond(0).await };
            let path = lab.dir.path().join("state");
            // As the agent makes it: its own, closed to QEMU's user.
            let file =
                File::options().read(true).write(true).create(true).truncate(true).open(&path);
            let file = file.unwrap();
            let progress = watch::Sender::default();
            let saved = soon(state_file::save(&source.machine, &file, layout, &progress)).await;
            assert!(saved.unwrap().ram.total_bytes > Some(0));
            assert!(file.metadata().unwrap().len() > 0);
            source.machine.quit().await.unwrap();
            soon(source.process.wait_exit()).await;

            let restored = lab.start_spec(&onto, lab.writer("restored", true)).await;
            state_file::restore(&restored.machine, &File::open(&path).unwrap(), layout)
                .await
                .unwrap();
            let loaded = soon(incoming::wait_loaded(&restored.machine)).await.unwrap();
            assert!(loaded.whole && loaded.run_state == RunState::Paused, "{loaded:?}");
            if !from.fake {
                assert_eq!(restored.rounds_beyond(rounds - 1).await, rounds);
            }
            restored.machine.cont().await.unwrap();
            assert_eq!(restored.run_state().await, RunState::Running);
        }
    }
}

/// What goes on after a failure to save is the same guest, stopped.
#[tokio::test]
async fn a_state_that_can_not_be_written_leaves_the_guest_as_it_was() {
    for engine in crate::rig::real_engines() {
        let lab = Lab::new();
        let guest = lab.start_writing(&engine, "web01").await;
        guest.machine.stop().await.unwrap();
        let rounds = guest.rounds_beyond(0).await;
        let full = File::options().write(true).open("/dev/full").unwrap();
        let progress = watch::Sender::default();
        let error = soon(state_file::save(&guest.machine, &full, Layout::Stream, &progress)).await;
        let error = error.unwrap_err();
        // Where it is a file by name, QEMU tries to empty it first.
        let early = matches!(&error, SaveError::Prepare { source, .. } if source.is_refusal());
        assert!(early || matches!(error, SaveError::Failed { .. }), "{error:?}");
        assert!(!guest.machine.status().await.unwrap().running);
        let file = File::create(lab.dir.path().join("state")).unwrap();
        soon(state_file::save(&guest.machine, &file, Layout::Stream, &progress)).await.unwrap();
        guest.machine.cont().await.unwrap();
        guest.rounds_beyond(rounds).await;
    }
}
