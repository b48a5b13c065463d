//! Bounds, and what is drawn and named.

use proptest::prelude::*;
use whimbrel_api::vm::ImageFormat;

use super::*;

fn spec() -> VmSpec {
    serde_json::from_value(serde_json::json!({
        "name": "web01", "memory": "1GiB",
        "disk": [{"storage": "shared", "size": "1GiB"}],
        "nic": [{"network": "lan"}],
    }))
    .unwrap()
}

fn refused(change: impl FnOnce(&mut VmSpec)) -> ErrorCode {
    let mut spec = spec();
    change(&mut spec);
    check(&spec).unwrap_err().code
}

#[test]
fn bounds_are_checked() {
    check(&spec()).unwrap();
    use ErrorCode::{BadRequest, OutOfRange};
    assert_eq!(refused(|s| s.vcpus = 0), OutOfRange);
    assert_eq!(refused(|s| s.vcpus = 256), OutOfRange);
    assert_eq!(refused(|s| s.memory = Bytes(1 << 20)), OutOfRange);
    assert_eq!(refused(|s| s.memory = Bytes(u64::MAX)), OutOfRange);
    assert_eq!(refused(|s| s.disks = vec![s.disks[0].clone(); 65]), OutOfRange);
    assert_eq!(refused(|s| s.nics = vec![s.nics[0].clone(); 17]), OutOfRange);
    assert_eq!(refused(|s| s.disks[0].size = Some(Bytes(1))), OutOfRange);
    assert_eq!(refused(|s| s.disks[0].size = Some(Bytes((1 << 30) + 1))), BadRequest);
    assert_eq!(refused(|s| s.disks[0].size = None), BadRequest);
    assert_eq!(refused(|s| s.disks[0].import = Some("a/b".parse().unwrap())), BadRequest);
    assert_eq!(refused(|s| s.disks[0].import_format = Some(ImageFormat::Raw)), BadRequest);
    assert_eq!(refused(|s| s.cpu = Some("qemu64,+svm".into())), BadRequest);
    assert_eq!(refused(|s| s.machine = Some("q35".into())), BadRequest);
    assert_eq!(refused(|s| s.machine = Some("pc-q35-7.2,accel=kvm".into())), BadRequest);
    let kernel =
        |cmdline: String| Boot::Kernel { kernel: "a/b".parse().unwrap(), initrd: None, cmdline };
    assert_eq!(refused(|s| s.boot = kernel("x".repeat(2049))), OutOfRange);
    assert_eq!(refused(|s| s.boot = kernel("a\nb".into())), BadRequest);
}

#[test]
fn a_card_has_one_address_of_its_own() {
    let mac = |mac: &str| {
        let mut spec = spec();
        spec.nics[0].mac = Some(mac.to_owned());
        check(&spec).map(|()| spec)
    };
    for bad in [
        "",
        "52:54:00:00:00",
        "52:54:00:00:00:0",
        "53:54:00:00:00:01",
        "00:00:00:00:00:00",
        "52:54:00:00:00:+1",
        "52-54-00-00-00-01",
        "52:54:00:00:00:01:02",
    ] {
        assert!(mac(bad).is_err(), "{bad}");
    }
    let spec = mac("52:54:00:AB:CD:EF").unwrap();
    let define = |taken: &BTreeSet<String>| define(VmId::new(), &spec, "m".into(), taken);
    assert_eq!(define(&BTreeSet::new()).unwrap().nics[0].mac, "52:54:00:ab:cd:ef");
    let taken = BTreeSet::from(["52:54:00:ab:cd:ef".to_owned()]);
    assert_eq!(define(&taken).unwrap_err().code, ErrorCode::Exists);
    let mut twice = spec.clone();
    twice.nics.push(twice.nics[0].clone());
    assert!(check(&twice).is_err());
}

#[test]
fn everything_is_named_and_drawn() {
    let mut spec = spec();
    spec.disks = vec![spec.disks[0].clone(); 28];
    spec.nics = vec![spec.nics[0].clone(); 16];
    spec.memory = Bytes(1_000_000_000);
    let id = VmId::new();
    let made = define(id, &spec, "pc-q35-7.2".into(), &BTreeSet::new()).unwrap();
    assert_eq!(made.memory_bytes % MEMORY_STEP_BYTES, 0);
    assert!(made.memory_bytes >= 1_000_000_000);
    assert_eq!(made.cpu, "qemu64");
    assert_eq!(made.disks[0].file.to_string(), format!("shared/vms/{id}/vda.qcow2"));
    let names: BTreeSet<&str> = made.disks.iter().map(|disk| disk.name.as_str()).collect();
    assert_eq!(names.len(), 28);
    assert!(names.contains("vdz") && names.contains("vdaa") && names.contains("vdab"));
    let macs: BTreeSet<&String> = made.nics.iter().map(|nic| &nic.mac).collect();
    assert_eq!(macs.len(), 16);
    assert!(macs.iter().all(|mac| mac.starts_with("52:54:00:")));
}

#[test]
fn needs_name_every_storage_and_network() {
    let mut spec = spec();
    spec.disks[0].import = Some("images/debian.raw".parse().unwrap());
    spec.boot = Boot::Kernel {
        kernel: "boot/vmlinuz".parse().unwrap(),
        initrd: Some("boot2/initrd".parse().unwrap()),
        cmdline: String::new(),
    };
    let needs = needs(&spec);
    let names: Vec<&str> = needs.storages.iter().map(Name::as_str).collect();
    assert_eq!(names, ["boot", "boot2", "images", "shared"]);
}

proptest! {
    #[test]
    fn no_request_makes_the_parser_or_the_check_panic(
        name in "\\PC{0,8}", memory in any::<u64>(), vcpus in any::<u32>(),
        cpu in "\\PC{0,6}", mac in "\\PC{0,20}", size in any::<u64>(),
    ) {
        let json = serde_json::json!({
            "name": name, "memory": memory, "vcpus": vcpus, "cpu": cpu,
            "disk": [{"storage": "s", "size": size}], "nic": [{"network": "n", "mac": mac}],
        });
        if let Ok(spec) = serde_json::from_value::<VmSpec>(json)
            && check(&spec).is_ok()
        {
            let made = define(VmId::new(), &spec, "pc-q35-7.2".into(), &BTreeSet::new()).unwrap();
            prop_assert!(made.memory_bytes >= memory);
            prop_assert!(!made.cpu.contains(','));
            prop_assert_eq!(made.nics[0].mac.len(), 17);
        }
    }

    #[test]
    fn a_machine_without_version_never_passes(machine in "[a-z0-9.-]{0,12}") {
        let passes = check_machine(&machine).is_ok();
        prop_assert_eq!(passes, machine_version(&machine).is_some());
    }
}
