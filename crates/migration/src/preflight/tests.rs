//! Each rule alone, then all of them together.

use super::*;
use crate::names::MigrationId;
use proptest::prelude::*;

const GIB: u64 = 1024 * MIB_BYTES;

fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

fn set(items: &[&str]) -> BTreeSet<String> {
    items.iter().map(|item| (*item).to_owned()).collect()
}

fn names(items: &[&str]) -> BTreeSet<Name> {
    items.iter().map(|item| name(item)).collect()
}

/// A move to which nothing objects.
fn good() -> Question {
    Question {
        vm: VmFacts {
            name: name("web01"),
            state: GuestState::Running,
            memory_bytes: GIB,
            saved_mapped: false,
            engine: "7.2.22".parse().unwrap(),
            accelerator: Accelerator::Tcg,
            machine_type: "pc-q35-7.2".into(),
            cpu_model: "qemu64".into(),
            cpu_features: set(&["sse2", "cx16"]),
            files: vec![
                FileFacts {
                    label: "disk root".into(),
                    storage: name("fast"),
                    path: "web01.qcow2".into(),
                },
                FileFacts { label: "kernel".into(), storage: name("boot"), path: "vmlinuz".into() },
            ],
            nics: vec![NicFacts { label: "nic 0".into(), network: name("lan") }],
            unmovable: Vec::new(),
            migration: None,
        },
        mode: Mode::Auto,
        source: name("host-a"),
        destination: HostFacts {
            name: name("host-b"),
            enabled: true,
            engines: vec![EngineFacts {
                version: "7.2.22".parse().unwrap(),
                accelerators: [Accelerator::Tcg].into(),
                machine_types: set(&["pc-q35-7.2", "pc-q35-7.1"]),
                cpu_models: set(&["qemu64"]),
                maps_memory: false,
            }],
            cpu_features: set(&["sse2", "cx16", "avx"]),
            memory_total_bytes: 8 * GIB,
            memory_available_bytes: 2 * GIB,
            networks: names(&["lan", "dmz"]),
            storages: names(&["fast", "boot", "slow"]),
        },
        shared_storages: names(&["fast", "boot"]),
        reach: Reach::Reachable,
    }
}

type Spoil = fn(&mut Question);

/// One way to break each rule, with the words that its problem must have.
fn spoils() -> Vec<(Code, Spoil, &'static [&'static str])> {
    vec![
        (Code::DestinationDisabled, |q| q.destination.enabled = false, &["host-b"]),
        (Code::VmNotRunning, |q| q.vm.state = GuestState::Stopped, &["web01", "stopped"]),
        (Code::AlreadyMigrating, |q| q.vm.migration = Some(MigrationId::new()), &["web01"]),
        (Code::EngineMissing, |q| q.destination.engines.clear(), &["host-b", "7.2.22"]),
        (Code::AcceleratorMissing, |q| q.vm.accelerator = Accelerator::Kvm, &["KVM", "7.2.22"]),
        (
            Code::MachineTypeMissing,
            |q| q.vm.machine_type = "pc-q35-10.0".into(),
            &["pc-q35-10.0", "7.2.22", "host-b"],
        ),
        (Code::CpuModelMissing, |q| q.vm.cpu_model = "EPYC-Turin".into(), &["EPYC-Turin"]),
        (
            Code::CpuFeatures,
            |q| q.vm.cpu_features.extend(set(&["pku", "avx512f"])),
            &["avx512f, pku", "host-b"],
        ),
        (Code::EngineOlder, |q| q.vm.engine = "10.0.2".parse().unwrap(), &["10.0.2", "7.2.22"]),
        (
            Code::Memory,
            |q| q.destination.memory_available_bytes = GIB,
            &["1152 MiB", "1024 MiB", "8192 MiB"],
        ),
        (Code::NetworkMissing, |q| q.vm.nics[0].network = name("vlan7"), &["vlan7", "nic 0"]),
        (
            Code::DiskUnreachable,
            |q| q.vm.files[0].storage = name("nas"),
            &["no storage nas", "disk root", "web01.qcow2"],
        ),
        (
            Code::DiskUnreachable,
            |q| q.shared_storages.retain(|storage| storage.as_str() != "boot"),
            &["is not the one on host host-a", "kernel", "vmlinuz"],
        ),
        (
            Code::DeviceCannotMove,
            |q| {
                q.vm.unmovable.push(UnmovableDevice {
                    device: "gpu0".into(),
                    because: "it is a device of the host".into(),
                });
            },
            &["gpu0", "device of the host"],
        ),
        (
            Code::AddressUnresolvable,
            |q| {
                q.reach = Reach::Unresolvable {
                    by: name("host-a"),
                    host: "host-b.example".into(),
                    because: "no such name".into(),
                };
            },
            &["host-b.example", "no such name"],
        ),
        (
            Code::PortClosed,
            |q| {
                q.reach = Reach::PortClosed {
                    address: "10.0.0.2:7402".into(),
                    because: "connection refused".into(),
                };
            },
            &["10.0.0.2:7402", "connection refused"],
        ),
        (
            Code::SavedStateLayout,
            |q| q.vm.saved_mapped = true,
            &["7.2.22", "host-b", "saved state"],
        ),
        (
            Code::AddressNotItsOwn,
            |q| q.reach = Reach::NotItsOwn { because: "10.0.0.9 is not one of its own".into() },
            &["host-b", "10.0.0.9"],
        ),
        (
            Code::SourceNotAllowed,
            |q| q.reach = Reach::NotAllowed { because: "it is not in its list".into() },
            &["host-a", "it is not in its list"],
        ),
        (
            Code::TlsFailed,
            |q| {
                q.reach = Reach::TlsFailed {
                    address: "10.0.0.2:7402".into(),
                    because: "the certificate has expired".into(),
                };
            },
            &["10.0.0.2:7402", "expired"],
        ),
        (Code::AddressNotProbed, |q| q.reach = Reach::NotProbed, &["host-a", "host-b"]),
    ]
}

fn codes_of(verdicts: &[Verdict]) -> Vec<Code> {
    verdicts.iter().map(|verdict| verdict.code).collect()
}

#[test]
fn nothing_objects_to_a_good_move() {
    assert_eq!(check(&good()), []);
    let mut paused = good();
    paused.vm.state = GuestState::Paused;
    assert_eq!(check(&paused), [], "a paused VM moves too");
}

#[test]
fn each_rule_alone_gives_its_one_verdict() {
    for (code, spoil, words) in spoils() {
        let mut question = good();
        spoil(&mut question);
        let verdicts = check(&question);
        assert_eq!(codes_of(&verdicts), [code]);
        let Verdict { severity, problem, advice, .. } = &verdicts[0];
        for word in words {
            assert!(problem.contains(word), "{code}: {problem:?} lacks {word:?}");
        }
        assert!(problem.ends_with('.') && advice.ends_with('.'), "{code}: {problem} {advice}");
        let warns = matches!(code, Code::EngineOlder | Code::AddressNotProbed);
        assert_eq!(*severity == Severity::Warn, warns, "{code}");
        assert_eq!(refuses(&verdicts), !warns, "{code}");
    }
}

#[test]
fn every_code_has_a_case_and_its_word_in_json() {
    let mut tested: BTreeSet<Code> = spoils().iter().map(|(code, ..)| *code).collect();
    tested.extend(combinations::tests::cases().iter().map(|case| case.code));
    tested.extend(disks::tests::cases().iter().map(|(code, ..)| *code));
    for code in Code::ALL {
        assert!(tested.contains(code) || *code == Code::SameHost, "{code} has no case");
        assert_eq!(serde_json::to_value(code).unwrap(), code.as_str());
    }
}

#[test]
fn same_host_is_told_without_noise() {
    let mut question = good();
    question.destination.name = name("host-a");
    question.destination.engines.clear();
    assert_eq!(codes_of(&check(&question)), [Code::SameHost]);
    question.vm.state = GuestState::Crashed;
    assert_eq!(codes_of(&check(&question)), [Code::VmNotRunning, Code::SameHost]);
}

#[test]
fn memory_counts_the_engine_and_says_when_the_host_is_too_small() {
    let mut question = good();
    question.destination.memory_available_bytes = GIB + ENGINE_OVERHEAD_BYTES;
    assert_eq!(check(&question), []);
    question.destination.memory_available_bytes -= 1;
    assert!(check(&question)[0].advice.starts_with("Free memory"));
    question.vm.memory_bytes = u64::MAX;
    assert!(check(&question)[0].advice.contains("too small"));
}

#[test]
fn the_newest_suitable_engine_is_chosen() {
    let mut question = good();
    let mut newer = question.destination.engines[0].clone();
    newer.version = "10.0.2".parse().unwrap();
    question.destination.engines.insert(0, newer.clone());
    let mut newest = newer.clone();
    newest.version = "11.0.0".parse().unwrap();
    newest.machine_types.remove("pc-q35-7.2");
    question.destination.engines.push(newest);
    assert_eq!(choose_engine(&question.vm, &question.destination), Some(&newer));
    assert_eq!(check(&question), []);
}

#[test]
fn each_missing_network_and_file_is_named_once() {
    let mut question = good();
    for label in ["nic 1", "nic 2"] {
        question.vm.nics.push(NicFacts { label: label.into(), network: name("vlan7") });
    }
    question.shared_storages.clear();
    let verdicts = check(&question);
    assert_eq!(
        codes_of(&verdicts),
        [Code::NetworkMissing, Code::DiskUnreachable, Code::DiskUnreachable]
    );
    assert!(verdicts[0].problem.contains("nic 1, nic 2"));
}

proptest! {
    /// Verdicts do not hide each other: whatever is spoilt together is reported together.
    #[test]
    fn all_verdicts_at_once(picks in proptest::collection::vec(any::<bool>(), spoils().len())) {
        let spoils = spoils();
        prop_assert_eq!(picks.len(), spoils.len());
        let mut question = good();
        let mut expected = BTreeSet::new();
        for ((code, spoil, _), pick) in spoils.into_iter().zip(picks) {
            if pick {
                spoil(&mut question);
                expected.insert(code);
            }
        }
        // What a later spoil of the same field replaces, and what follows from a missing engine.
        let reach = [
            Code::AddressUnresolvable, Code::PortClosed, Code::AddressNotItsOwn, Code::SourceNotAllowed, Code::TlsFailed,
            Code::AddressNotProbed,
        ];
        let engine = [
            Code::EngineMissing, Code::AcceleratorMissing, Code::MachineTypeMissing,
            Code::CpuModelMissing, Code::SavedStateLayout, Code::EngineOlder,
        ];
        for chain in [&reach[..], &engine[..]] {
            let last_or_first = if chain == &reach[..] {
                chain.iter().rev().find(|code| expected.contains(code)).copied()
            } else {
                chain.iter().find(|code| expected.contains(code)).copied()
            };
            expected.retain(|code| !chain.contains(code) || Some(*code) == last_or_first);
        }
        let found: BTreeSet<Code> = codes_of(&check(&question)).into_iter().collect();
        prop_assert_eq!(found, expected);
    }

    /// More of everything on the destination never adds a refusal.
    #[test]
    fn memory_is_monotonic(memory in 0_u64..8 * GIB, available in 0_u64..8 * GIB, more in 0_u64..GIB) {
        let mut question = good();
        question.vm.memory_bytes = memory;
        question.destination.memory_available_bytes = available;
        let before = refuses(&check(&question));
        question.destination.memory_available_bytes += more;
        let after = refuses(&check(&question));
        prop_assert!(before || !after);
    }
}

#[test]
fn a_saved_state_goes_only_where_it_can_be_restored() {
    let mut question = good();
    question.mode = Mode::Offline;
    question.vm.state = GuestState::Stopped;
    question.vm.saved_mapped = true;
    assert_eq!(codes_of(&check(&question)), [Code::SavedStateLayout]);
    question.destination.engines[0].maps_memory = true;
    assert_eq!(check(&question), []);
}

#[test]
fn offline_looks_at_the_definition_only() {
    let mut question = good();
    question.mode = Mode::Offline;
    question.vm.state = GuestState::Stopped;
    question.vm.engine = "0.0.0".parse().unwrap();
    question.vm.accelerator = Accelerator::Kvm;
    question.vm.memory_bytes = u64::MAX;
    question.vm.cpu_features = set(&["avx512f"]);
    question.vm.unmovable =
        vec![UnmovableDevice { device: "gpu0".into(), because: "it is the host's".into() }];
    question.reach = Reach::NotProbed;
    assert_eq!(check(&question), []);
    // The destination's list is about VMs, whether they run or not; a closed port is not.
    question.reach = Reach::NotAllowed { because: "it is not in its list".into() };
    assert_eq!(codes_of(&check(&question)), [Code::SourceNotAllowed]);
    question.reach =
        Reach::PortClosed { address: "10.0.0.2:7402".into(), because: "connection refused".into() };
    assert_eq!(check(&question), []);
    question.vm.machine_type = "pc-q35-10.0".into();
    question.vm.nics[0].network = name("vlan7");
    question.shared_storages.clear();
    let expected = [
        Code::MachineTypeMissing,
        Code::NetworkMissing,
        Code::DiskUnreachable,
        Code::DiskUnreachable,
    ];
    assert_eq!(codes_of(&check(&question)), expected);
    question.destination.engines.clear();
    let verdicts = check(&question);
    assert_eq!(verdicts[0].code, Code::EngineMissing);
    assert!(!verdicts[0].problem.contains("0.0.0"));
}
