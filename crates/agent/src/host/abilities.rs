//! What an engine can do for a migration, in the rules' words: by its own description of QMP, never by its version.

use std::collections::BTreeSet;

use whimbrel_migration::preflight::EngineAbilities;
use whimbrel_qemu::schema::Features;

/// The size of the pages in which a guest is given its memory, in bytes: no VM is given huge pages.
const MEMORY_PAGE_BYTES: u64 = 4096;

/// What an engine with these features can do; none if its version is no version.
pub(crate) fn abilities(
    version: &str,
    features: &Features,
    postcopy_obstacle: Option<String>,
) -> Option<EngineAbilities> {
    let given =
        features.avail_switchover_bandwidth.then(|| "avail-switchover-bandwidth".to_owned());
    Some(EngineAbilities {
        version: version.parse().ok()?,
        capabilities: features.migration_capabilities.clone(),
        parameters: BTreeSet::from_iter(given),
        compressions: features.multifd_compressions.clone(),
        postcopy_obstacle,
        memory_page_bytes: MEMORY_PAGE_BYTES,
    })
}
