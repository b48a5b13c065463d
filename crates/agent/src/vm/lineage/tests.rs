//! Trees of snapshots, by what each disk reads in them.

use whimbrel_api::VmId;
use whimbrel_api::vm::Boot;

use super::*;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn file(vm: VmId, text: &str) -> StoragePath {
    StoragePath::new(name("s"), &format!("vms/{vm}/{text}")).unwrap()
}

fn vm() -> VmDefinition {
    let id = VmId::new();
    let disk = |letters: &str, read_only| Disk {
        name: name(letters),
        file: file(id, letters),
        format: ImageFormat::Raw,
        size_bytes: 1 << 20,
        read_only,
        import: None,
        layers: Vec::new(),
    };
    VmDefinition {
        id,
        generation: 1,
        name: name("web01"),
        vcpus: 1,
        memory_bytes: 1 << 30,
        cpu: "qemu64".to_owned(),
        machine: "pc-q35-7.2".to_owned(),
        boot: Boot::default(),
        disks: vec![disk("vda", false), disk("vdb", true)],
        nics: Vec::new(),
        saved: None,
        origin: None,
        template: false,
        snapshots: Vec::new(),
        snapshot: None,
    }
}

fn overlay(vm: &VmDefinition, text: &str) -> Overlays {
    Overlays::from([(name("vda"), file(vm.id, text))])
}

fn take(vm: &VmDefinition, snapshot: &str, overlay_name: &str) -> VmDefinition {
    taken(vm, &name(snapshot), Timestamp::UNIX_EPOCH, &overlay(vm, overlay_name), None)
}

fn back(vm: &VmDefinition, to: &str, overlay_name: &str) -> VmDefinition {
    reverted(vm, find(vm, &name(to)).unwrap(), &overlay(vm, overlay_name))
}

/// The last parts of the files' names, the latest first.
fn ends(layers: &[Layer]) -> Vec<&str> {
    layers.iter().map(|layer| layer.file.path.rsplit('/').next().unwrap()).collect()
}

fn now(vm: &VmDefinition) -> Vec<Layer> {
    images(&vm.disks[0])
}

#[test]
fn a_tree_of_snapshots_reads_as_it_was_taken() {
    let vm = vm();
    let one = take(&vm, "one", "b");
    let two = take(&one, "two", "c");
    assert_eq!(ends(&now(&two)), ["c", "b", "vda"]);
    let other = take(&back(&two, "one", "d"), "other", "e");
    assert_eq!(ends(&now(&other)), ["e", "d", "vda"]);
    let was = |snapshot: &str| chain(&other, &name(snapshot), &name("vda"));
    assert_eq!(ends(&was("one")), ["vda"]);
    assert_eq!(ends(&was("two")), ["b", "vda"]);
    assert_eq!(ends(&was("other")), ["d", "vda"]);
    assert_eq!(was("one")[0].format, ImageFormat::Raw);
    assert_eq!(other.disks[0].format, ImageFormat::Qcow2);
    assert_eq!(ends(&images(&other.disks[1])), ["vdb"], "what is only read has no overlay");
    assert_eq!(other.generation, vm.generation + 4);
    assert_eq!(other.snapshot, Some(name("other")));
}

#[test]
fn a_snapshot_that_goes_leaves_the_others_as_they_were() {
    let two = take(&take(&vm(), "one", "b"), "two", "c");
    let tree = take(&back(&two, "one", "d"), "other", "e");
    let before: Vec<_> =
        ["two", "other"].map(|s| chain(&tree, &name(s), &name("vda"))).into_iter().collect();
    let less = without(&tree, &name("one"));
    let after: Vec<_> =
        ["two", "other"].map(|s| chain(&less, &name(s), &name("vda"))).into_iter().collect();
    assert_eq!(before, after);
    assert_eq!(now(&less), now(&tree));
    assert_eq!(less.snapshots.iter().filter(|s| s.parent.is_none()).count(), 2);
    let gone: BTreeSet<_> =
        files(&less).difference(&files(&without(&less, &name("two")))).cloned().collect();
    assert_eq!(gone, BTreeSet::from([file(tree.id, "b")]), "`vda` is still beneath `other`");
}

#[test]
fn only_what_nothing_else_stands_on_is_merged() {
    let two = take(&take(&vm(), "one", "b"), "two", "c");
    assert!(mergeable(&two).is_none());
    let one = without(&two, &name("two"));
    assert_eq!(mergeable(&one).unwrap().name, name("vda"));
    let one = merged(&one, &name("vda"));
    assert_eq!(ends(&now(&one)), ["b", "vda"]);
    assert!(mergeable(&one).is_none(), "`vda` is `one`'s");
    let none = without(&one, &name("one"));
    let whole = merged(&none, &mergeable(&none).unwrap().name.clone());
    assert_eq!((ends(&now(&whole)), whole.disks[0].format), (vec!["vda"], ImageFormat::Raw));

    let mut clone = vm();
    clone.disks[0].layers = now(&one);
    assert!(mergeable(&clone).is_none(), "another VM's images are not merged");
    assert_eq!(own_files(&clone).len(), 2);
}
