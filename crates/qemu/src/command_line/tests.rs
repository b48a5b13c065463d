//! The arguments as a whole, and what each rule of [`super`] refuses or adds.

use std::path::PathBuf;

use super::*;

fn web01() -> VmSpec {
    VmSpec {
        name: "web01".to_owned(),
        uuid: Uuid::from_u128(0x1234),
        machine_type: "pc-q35-7.2".to_owned(),
        accelerator: Accelerator::Tcg,
        cpu: CpuSpec { model: "Nehalem".to_owned(), features: BTreeMap::new() },
        vcpus: 2,
        memory_bytes: 1024 * BYTES_PER_MEBIBYTE,
        boot: Boot::Kernel {
            kernel: "/srv/vmlinuz".into(),
            initrd: Some("/srv/initrd,img".into()),
            command_line: "console=ttyS0 quiet".to_owned(),
        },
        disks: vec![DiskSpec {
            node: "disk0".to_owned(),
            path: "/srv/web01,format=raw.qcow2".into(),
            format: DiskFormat::Qcow2,
            read_only: false,
            serial: Some("root".to_owned()),
            cache: Cache::None,
            layers: Vec::new(),
        }],
        nics: vec![NicSpec {
            id: "net0".to_owned(),
            mac: "52:54:00:00:00:01".to_owned(),
            tap_descriptor: 30,
        }],
        console: ConsoleSpec { socket: "/run/web01/console".into(), log: "/run/web01/log".into() },
        qmp_socket: "/run/web01/qmp".into(),
        incoming: false,
    }
}

/// One argument a line, an empty line before each option, JSON with sorted keys (their order is
/// that of the build's serde_json features, and means nothing to QEMU).
fn lines(spec: &VmSpec) -> String {
    let arguments = arguments(spec).unwrap();
    let text = arguments.iter().map(|argument| {
        let argument = argument.to_str().unwrap();
        serde_json::from_str(argument)
            .map_or(argument.to_owned(), |value| sorted(value).to_string())
    });
    text.collect::<Vec<_>>().join("\n").replace("\n-", "\n\n-")
}

fn sorted(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let ordered: BTreeMap<String, Value> =
                map.into_iter().map(|(key, value)| (key, sorted(value))).collect();
            ordered.into_iter().collect()
        }
        other => other,
    }
}

#[test]
fn plain() {
    insta::assert_snapshot!(lines(&web01()));
}

#[test]
fn incoming_differs_by_one_option() {
    let plain = arguments(&web01()).unwrap();
    let mut incoming = arguments(&VmSpec { incoming: true, ..web01() }).unwrap();
    assert_eq!(incoming.split_off(plain.len()), ["-incoming", "defer"]);
    assert_eq!(incoming, plain);
}

#[test]
fn firmware_and_other_bus() {
    let mut spec = web01();
    spec.machine_type = "pc-i440fx-7.2".to_owned();
    spec.accelerator = Accelerator::Kvm;
    spec.cpu.features =
        [("aes".to_owned(), false), ("sse4.2".to_owned(), true)].into_iter().collect();
    spec.boot =
        Boot::Ovmf { code: "/usr/OVMF_CODE.fd".into(), variables: "/srv/web01_vars.fd".into() };
    insta::assert_snapshot!(lines(&spec));
}

#[test]
fn a_comma_in_a_path_adds_no_option() {
    let mut spec = web01();
    spec.qmp_socket = "/run/a,server=off/qmp".into();
    let text = lines(&spec);
    assert!(text.contains("path=/run/a,,server=off/qmp,server=on"), "{text}");
}

#[test]
fn what_can_not_be_expressed_is_refused() {
    let refused = |change: fn(&mut VmSpec)| {
        let mut spec = web01();
        change(&mut spec);
        arguments(&spec).unwrap_err()
    };
    assert!(matches!(
        refused(|spec| spec.cpu.model = "max,-sse".to_owned()),
        SpecError::Word { what: "CPU model", .. }
    ));
    assert!(matches!(
        refused(|spec| spec.machine_type = "q35,usb=on".to_owned()),
        SpecError::Word { what: "machine type", .. }
    ));
    assert!(matches!(refused(|spec| spec.memory_bytes += 1), SpecError::Bounds { .. }));
    assert!(matches!(refused(|spec| spec.memory_bytes = 0), SpecError::Bounds { .. }));
    assert!(matches!(refused(|spec| spec.vcpus = 0), SpecError::Bounds { .. }));
    assert!(matches!(
        refused(|spec| spec.nics[0].id = "disk0".to_owned()),
        SpecError::SameId { .. }
    ));
    assert!(matches!(
        refused(|spec| spec.nics = vec![spec.nics[0].clone(); NICS_MAX + 1]),
        SpecError::Bounds { what: "NICs", found: 9, .. }
    ));
    assert!(matches!(
        refused(|spec| spec.disks[0].serial = Some("x".repeat(DISK_SERIAL_BYTES_MAX + 1))),
        SpecError::Bounds { .. }
    ));
    assert!(matches!(
        refused(|spec| {
            use std::os::unix::ffi::OsStringExt;
            spec.disks[0].path = PathBuf::from(OsString::from_vec(vec![0xff]));
        }),
        SpecError::PathNotUtf8 { .. }
    ));
}

#[test]
fn most_devices_fit_their_addresses() {
    let mut spec = web01();
    let disk = spec.disks[0].clone();
    spec.disks = (0..DISKS_MAX)
        .map(|index| DiskSpec { node: format!("disk{index}"), ..disk.clone() })
        .collect();
    let nic = spec.nics[0].clone();
    spec.nics =
        (0..NICS_MAX).map(|index| NicSpec { id: format!("net{index}"), ..nic.clone() }).collect();
    let text = lines(&spec);
    let addresses = text.lines().filter_map(|line| line.split_once("\"addr\":\"0x"));
    let mut slots: Vec<&str> = addresses.map(|(_, rest)| &rest[..2]).collect();
    slots.sort_unstable();
    let distinct = slots.len();
    slots.dedup();
    assert_eq!((slots.len(), distinct), (DISKS_MAX + NICS_MAX + 1, DISKS_MAX + NICS_MAX + 1));
    assert!(slots.first() > Some(&"01") && slots.last() < Some(&"1f"), "{slots:?}");
}

#[test]
fn a_translated_guest_has_a_block_whose_every_write_is_seen() {
    let size = |accelerator, machine_type: &str| {
        let spec = VmSpec { accelerator, machine_type: machine_type.to_owned(), ..web01() };
        let text = lines(&spec);
        let beside = block_bytes(&spec) - spec.memory_bytes;
        assert!(text.contains(&format!("size={}K", block_bytes(&spec) / 1024)), "{text}");
        assert!(text.contains(&format!("\"size\":{}", block_bytes(&spec))), "{text}");
        beside
    };
    assert_eq!(size(Accelerator::Tcg, "pc-q35-7.2"), TCG_EXTRA_BYTES);
    assert_eq!(size(Accelerator::Tcg, "pc-i440fx-9.2"), TCG_EXTRA_BYTES);
    assert_eq!(size(Accelerator::Tcg, "pc-q35-10.0"), 0);
    assert_eq!(size(Accelerator::Tcg, "microvm"), TCG_EXTRA_BYTES);
    assert_eq!(size(Accelerator::Kvm, "pc-q35-7.2"), 0);
    // 64 pages of 4 KiB are what QEMU marks with one word.
    assert_ne!((web01().memory_bytes + TCG_EXTRA_BYTES) % (64 * 4096), 0);
}

#[test]
fn what_a_disk_stands_on_is_always_said() {
    let node = |spec: &VmSpec| -> Value {
        let all = arguments(spec).unwrap();
        let mut nodes = all.iter().filter_map(|argument| {
            serde_json::from_str::<Value>(argument.to_str()?)
                .ok()
                .filter(|v| v["node-name"] == "disk0")
        });
        nodes.next().unwrap()
    };
    let mut spec = web01();
    assert_eq!(node(&spec).get("backing"), Some(&Value::Null));
    let layer = |path: &str, format| LayerSpec { path: path.into(), format, cache: Cache::None };
    spec.disks[0].layers =
        vec![layer("/srv/a,b", DiskFormat::Qcow2), layer("/srv/c", DiskFormat::Raw)];
    let first = node(&spec)["backing"].clone();
    assert_eq!(
        (&first["file"]["filename"], &first["read-only"]),
        (&json!("/srv/a,b"), &json!(true))
    );
    let second = &first["backing"];
    assert_eq!((&second["driver"], &second["file"]["filename"]), (&json!("raw"), &json!("/srv/c")));
    assert_eq!(second.get("backing"), None, "raw stands on nothing, and knows no such word");
    spec.disks[0].format = DiskFormat::Raw;
    assert_eq!(node(&spec).get("backing"), None);
}
