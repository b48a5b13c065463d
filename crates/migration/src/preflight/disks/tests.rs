//! Each verdict alone, all at once, and the room that is reckoned.

use super::*;
use crate::disks::mirror::{DiskMeasure, Memory, Way, forecast};
use crate::preflight::{Severity, refuses};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

/// What a question is made of, all of it sound: `vda` goes from `local` to `fast`, `vdb` stays on the shared `nfs`.
#[derive(Clone)]
pub(crate) struct Given {
    options: MigrateOptions,
    disks: Vec<DiskFacts>,
    source: Option<DiskAbilities>,
    destination: Option<DiskAbilities>,
    storages: Vec<StorageFacts>,
    shared: BTreeSet<Name>,
    default: Option<Name>,
    forecast: Option<DiskForecast>,
    by_management_network: bool,
}

fn disk(label: &str, storage: &str) -> DiskFacts {
    DiskFacts {
        name: name(label),
        storage: name(storage),
        path: format!("vms/1/{label}.qcow2"),
        format: ImageFormat::Qcow2,
        virtual_bytes: 10 * GIB,
        allocated_bytes: 2 * GIB,
        layers_bytes: 0,
        layers_held: false,
        used_by: Vec::new(),
        busy: None,
        uncopyable: None,
    }
}

fn storage(label: &str, free_bytes: u64) -> StorageFacts {
    StorageFacts {
        name: name(label),
        trouble: None,
        free_bytes,
        reserved_bytes: GIB,
        taken: BTreeMap::new(),
    }
}

fn look_ahead(write_bytes_per_s: u64) -> Option<DiskForecast> {
    let way = Way { bytes_per_s: 1e8, shared_with_memory: true, blocking: false };
    let disk = DiskMeasure { bytes: GIB, write_bytes_per_s };
    forecast(&[disk], way, Memory { total_ms: Some(1e3) })
}

fn good() -> Given {
    let options = serde_json::json!({"disks": {"others": "unreached"}});
    let all = DiskAbilities { export: true, mirror: true, blocking: true };
    Given {
        options: serde_json::from_value(options).unwrap(),
        disks: vec![disk("vda", "local"), disk("vdb", "nfs")],
        source: Some(all),
        destination: Some(all),
        storages: vec![storage("fast", 20 * GIB), storage("nfs", 0)],
        shared: BTreeSet::from([name("nfs")]),
        default: Some(name("fast")),
        forecast: look_ahead(MIB),
        by_management_network: false,
    }
}

impl Given {
    fn told(&self) -> Vec<Verdict> {
        check(&DiskQuestion {
            vm: &name("web01"),
            options: &self.options,
            disks: &self.disks,
            source: (&name("host-a"), self.source.as_ref()),
            destination: (&name("host-b"), self.destination.as_ref()),
            storages: &self.storages,
            shared: &self.shared,
            default: self.default.as_ref(),
            forecast: self.forecast.as_ref(),
            by_management_network: self.by_management_network,
        })
    }
}

type Spoil = fn(&mut Given);

/// What each verdict follows from, and what its sentence names.
pub(crate) fn cases() -> Vec<(Code, Spoil, &'static [&'static str])> {
    vec![
        (
            Code::DiskUnknown,
            |g| {
                g.options.disks.each.insert(name("vdz"), crate::options::DiskTarget::Stay);
            },
            &["web01", "vdz", "vda, vdb"],
        ),
        (
            Code::DiskInUse,
            |g| g.disks[0].used_by = vec![name("web02"), name("web03")],
            &["vda", "web01", "web02, web03"],
        ),
        (
            Code::DiskBusy,
            |g| g.disks[0].busy = Some("a backup reads it".into()),
            &["vda", "web01", "a backup reads it"],
        ),
        (
            Code::DiskUncopyable,
            |g| g.disks[0].uncopyable = Some("its image is marked as corrupt".into()),
            &["vda", "web01", "marked as corrupt"],
        ),
        (
            Code::DiskBaseMissing,
            |g| g.disks[0].layers_bytes = GIB,
            &["host-b", "vda", "web01", "1024 MiB"],
        ),
        (
            Code::DiskNameTaken,
            |g| {
                g.storages[0].taken.insert(name("vda"), "vms/1/vda-e5.qcow2".into());
            },
            &["vda", "web01", "vms/1/vda-e5.qcow2", "fast", "host-b"],
        ),
        (
            Code::StorageMissing,
            |g| g.default = Some(name("slow")),
            &["host-b", "slow", "vda", "web01"],
        ),
        (
            Code::StorageUnusable,
            |g| g.storages[0].trouble = Some("its file system is read-only".into()),
            &["fast", "host-b", "read-only"],
        ),
        (Code::NoDefaultStorage, |g| g.default = None, &["vda", "web01", "local", "host-b"]),
        (
            Code::StorageSpace,
            |g| g.storages[0].free_bytes = 3 * GIB,
            &["fast", "host-b", "3072 MiB", "1024 MiB", "vda", "web01", "2051 MiB"],
        ),
        (
            Code::StorageOvercommit,
            |g| g.storages[0].free_bytes = 10 * GIB,
            &["fast", "host-b", "9216 MiB", "vda", "web01", "10240 MiB"],
        ),
        (
            Code::EngineDisks,
            |g| g.destination = Some(DiskAbilities::default()),
            &["host-b", "web01", "take in a disk"],
        ),
        (
            Code::DisksNotConverging,
            |g| g.forecast = look_ahead(200_000_000),
            &["web01", "faster than"],
        ),
        (Code::DisksByManagement, |g| g.by_management_network = true, &["web01", "host-b"]),
    ]
}

fn codes_of(verdicts: &[Verdict]) -> Vec<Code> {
    verdicts.iter().map(|verdict| verdict.code).collect()
}

const WARNINGS: [Code; 4] = [
    Code::DiskBaseMissing,
    Code::StorageOvercommit,
    Code::DisksNotConverging,
    Code::DisksByManagement,
];

#[test]
fn nothing_objects_to_good_places() {
    assert_eq!(good().told(), []);
    // An agent that does not say what its QEMU can do, and a way that was not measured, stand in nobody's way.
    let unsaid = Given { source: None, destination: None, forecast: None, ..good() };
    assert_eq!(unsaid.told(), []);
}

#[test]
fn each_rule_alone_gives_its_one_verdict() {
    for (code, spoil, words) in cases() {
        let mut given = good();
        spoil(&mut given);
        let verdicts = given.told();
        assert_eq!(codes_of(&verdicts), [code]);
        let Verdict { severity, problem, advice, .. } = &verdicts[0];
        for word in words {
            assert!(problem.contains(word), "{code}: {problem:?} lacks {word:?}");
        }
        assert!(problem.ends_with('.') && advice.ends_with('.'), "{code}: {problem} {advice}");
        assert_eq!(*severity == Severity::Warn, WARNINGS.contains(&code), "{code}");
        assert_eq!(refuses(&verdicts), !WARNINGS.contains(&code), "{code}");
    }
}

#[test]
fn what_stays_is_asked_nothing() {
    for (code, spoil, _) in cases() {
        let mut given = good();
        spoil(&mut given);
        given.options.disks.others = crate::options::OtherDisks::Stay;
        let left: &[Code] = if code == Code::DiskUnknown { &[code] } else { &[] };
        assert_eq!(codes_of(&given.told()), left, "{code}");
    }
}

#[test]
fn all_disks_of_a_storage_are_counted_together_and_told_once() {
    let mut given = good();
    given.shared.clear();
    given.storages[0].free_bytes = 5 * GIB;
    let told = given.told();
    assert_eq!(codes_of(&told), [Code::StorageSpace]);
    assert!(told[0].problem.contains("vda, vdb") && told[0].problem.contains("4102 MiB"));
    assert!(told[0].advice.contains("reserved"), "there is room but for the reservation");
    given.storages[0].free_bytes = 4 * GIB;
    assert!(!given.told()[0].advice.contains("reserved"));
    // Each on a storage of its own has room.
    given.storages[1].free_bytes = 12 * GIB;
    given.storages[0].free_bytes = 12 * GIB;
    let to =
        |storage: &str| crate::options::DiskTarget::To { storage: name(storage), format: None };
    given.options.disks.each.insert(name("vdb"), to("nfs"));
    assert_eq!(given.told(), []);
}

#[test]
fn raw_needs_all_that_the_guest_sees_and_qcow2_what_is_allocated() {
    let mut one = disk("vda", "local");
    assert_eq!(needed_bytes(&one, ImageFormat::Raw), 10 * GIB);
    let qcow2 = needed_bytes(&one, ImageFormat::Qcow2);
    assert!(qcow2 > 2 * GIB && qcow2 < 2 * GIB + 4 * MIB, "{qcow2}");
    (one.layers_bytes, one.layers_held) = (GIB, true);
    assert_eq!(travelling_bytes(&one), GIB);
    assert!(needed_bytes(&one, ImageFormat::Qcow2) < qcow2);
    one.layers_held = false;
    assert_eq!(travelling_bytes(&one), 2 * GIB);
    // A raw file that is empty is sparse, and takes its room all the same: it cannot say later that there is none.
    one.allocated_bytes = 0;
    assert_eq!(needed_bytes(&one, ImageFormat::Raw), 10 * GIB);
    let huge = DiskFacts { virtual_bytes: u64::MAX, allocated_bytes: u64::MAX, ..one };
    assert_eq!(needed_bytes(&huge, ImageFormat::Qcow2), u64::MAX);
}
