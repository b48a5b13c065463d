//! Where each disk of a VM goes: from the user's options, and from what both hosts are known to reach.
//!
//! | the disk | goes |
//! |---|---|
//! | is named in [`DiskOptions::each`] | where that says |
//! | is not, and `others` names a storage | there |
//! | is not, and `others` is `unreached` | stays if both hosts reach it, else to the destination's default storage |
//! | is not, and `others` is `stay` | stays |
//!
//! A disk that is to go where it is already, on a storage that both hosts reach, in the format that it has, stays. Whether what
//! stays can be reached, and what goes has room, is preflight's to say.

use std::collections::BTreeSet;

use crate::disks::ImageFormat;
use crate::names::Name;
use crate::options::{DiskOptions, DiskTarget, OtherDisks};

/// What placing has to know of the destination.
#[derive(Debug, Clone, Copy)]
pub struct There<'a> {
    /// The storages of which it is *proven* that both hosts see the same one.
    pub shared: &'a BTreeSet<Name>,
    /// The storage for disks that nobody gave a place.
    pub default: Option<&'a Name>,
}

/// Where a disk goes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Place {
    /// Its files stay where they are, and both hosts use them.
    Stays,
    /// It is copied.
    Copied {
        /// To this storage of the destination.
        storage: Name,
        /// Into an image of this format.
        format: ImageFormat,
    },
    /// It would go to the destination's default storage, which has none.
    Nowhere,
}

/// The place of the disk `name`, which is on `storage` in `format` now.
#[must_use]
pub fn place(
    options: &DiskOptions,
    (name, storage, format): (&Name, &Name, ImageFormat),
    there: There<'_>,
) -> Place {
    let reached = there.shared.contains(storage);
    let to = |target: &Name, wanted: Option<ImageFormat>| {
        let wanted = wanted.unwrap_or(format);
        if reached && target == storage && wanted == format {
            Place::Stays
        } else {
            Place::Copied { storage: target.clone(), format: wanted }
        }
    };
    match (options.each.get(name), &options.others) {
        (Some(DiskTarget::Stay), _) | (None, OtherDisks::Stay) => Place::Stays,
        (Some(DiskTarget::To { storage, format }), _) => to(storage, *format),
        (None, OtherDisks::To { storage }) => to(storage, None),
        (None, OtherDisks::Unreached) if reached => Place::Stays,
        (None, OtherDisks::Unreached) => {
            there.default.map_or(Place::Nowhere, |name| to(name, None))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    fn placed(options: serde_json::Value, disk: &str, storage: &str) -> Place {
        let options: DiskOptions = serde_json::from_value(options).unwrap();
        let (shared, default) = (BTreeSet::from([name("nfs")]), name("ssd"));
        let there = There { shared: &shared, default: Some(&default) };
        place(&options, (&name(disk), &name(storage), ImageFormat::Qcow2), there)
    }

    fn copied(storage: &str, format: ImageFormat) -> Place {
        Place::Copied { storage: name(storage), format }
    }

    #[test]
    fn each_row_of_the_table() {
        use serde_json::json;
        let qcow2 = |storage| copied(storage, ImageFormat::Qcow2);
        assert_eq!(placed(json!({}), "vda", "local"), Place::Stays);
        let all = json!({"others": {"to": {"storage": "bulk"}}});
        assert_eq!(placed(all.clone(), "vda", "local"), qcow2("bulk"));
        assert_eq!(placed(all, "vda", "nfs"), qcow2("bulk"));
        let unreached = json!({"others": "unreached"});
        assert_eq!(placed(unreached.clone(), "vda", "nfs"), Place::Stays);
        assert_eq!(placed(unreached, "vda", "local"), qcow2("ssd"));
        let one = json!({"each": {"vda": {"to": {"storage": "bulk", "format": "raw"}}, "vdb": "stay"},
            "others": {"to": {"storage": "ssd"}}});
        assert_eq!(placed(one.clone(), "vda", "local"), copied("bulk", ImageFormat::Raw));
        assert_eq!(placed(one.clone(), "vdb", "local"), Place::Stays);
        assert_eq!(placed(one, "vdc", "local"), qcow2("ssd"));
    }

    #[test]
    fn what_is_there_already_is_not_copied_onto_itself() {
        use serde_json::json;
        let there = json!({"others": {"to": {"storage": "nfs"}}});
        assert_eq!(placed(there.clone(), "vda", "nfs"), Place::Stays);
        assert_eq!(placed(there, "vda", "local"), copied("nfs", ImageFormat::Qcow2));
        let raw = json!({"each": {"vda": {"to": {"storage": "nfs", "format": "raw"}}}});
        assert_eq!(placed(raw, "vda", "nfs"), copied("nfs", ImageFormat::Raw));
        // The same name on both hosts is not the same storage unless that is proven.
        let local = json!({"others": {"to": {"storage": "local"}}});
        assert_eq!(placed(local, "vda", "local"), copied("local", ImageFormat::Qcow2));
    }

    #[test]
    fn without_a_default_storage_there_is_no_place() {
        let options = DiskOptions { others: OtherDisks::Unreached, ..DiskOptions::default() };
        let shared = BTreeSet::new();
        let there = There { shared: &shared, default: None };
        let disk = (&name("vda"), &name("local"), ImageFormat::Raw);
        assert_eq!(place(&options, disk, there), Place::Nowhere);
    }
}
