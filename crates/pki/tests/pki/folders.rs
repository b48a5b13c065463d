//! Identity folders: round trips, modes, and every way in which a folder can be wrong.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use whimbrel_pki::authority::Authority;
use whimbrel_pki::files::{
    BundleError, ControllerIdentity, FilesError, HostIdentity, HostKeys, MONITOR_CERTIFICATE,
    MONITOR_KEY, MonitorIdentity, OperatorIdentity,
};
use whimbrel_pki::identity::Peer;
use whimbrel_pki::qemu_credentials::{
    QemuCredentialsError, QemuSide, remove_qemu_credentials, write_qemu_credentials,
};

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o777
}

fn listing(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_host_joins_saves_and_loads() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().join("identity");
    let pool = Authority::create().unwrap();
    let keys = HostKeys::generate().unwrap();
    let received = pool
        .issue_host("host-a", &keys.agent_request_pem().unwrap(), &keys.qemu_request_pem().unwrap())
        .unwrap();
    let received = serde_json::from_str(&serde_json::to_string(&received).unwrap()).unwrap();
    let identity = HostIdentity::assemble(keys, &received, "host-a").unwrap();
    assert!(!HostIdentity::exists(&home));
    identity.save(&home).unwrap();
    assert!(HostIdentity::exists(&home));
    identity.save(&home).unwrap();
    let files = [
        "agent-client.pem",
        "agent-server.pem",
        "agent.key",
        "ca.pem",
        "qemu-client.pem",
        "qemu-server.pem",
        "qemu.key",
    ];
    assert_eq!(listing(&home), files);
    assert_eq!(mode(&home), 0o700);
    for file in files {
        let expected = if file.ends_with(".key") { 0o600 } else { 0o644 };
        assert_eq!(mode(&home.join(file)), expected, "{file}");
    }
    let loaded = HostIdentity::load(&home).unwrap();
    assert_eq!(loaded.host(), "host-a");
    assert_eq!(loaded.server().certificate, identity.server().certificate);
    assert_eq!(loaded.qemu_client().certificate, identity.qemu_client().certificate);
    // The agent's key and QEMU's are two: QEMU's user can never speak as the agent.
    assert_ne!(loaded.server().key.to_pem(), loaded.qemu_server().key.to_pem());
}

#[test]
fn an_answer_for_another_host_or_key_is_not_taken() {
    let pool = Authority::create().unwrap();
    let request = |keys: &HostKeys| {
        let agent = keys.agent_request_pem().unwrap();
        pool.issue_host("host-a", &agent, &keys.qemu_request_pem().unwrap()).unwrap()
    };
    let keys = HostKeys::generate().unwrap();
    let received = request(&keys);
    let wrong = HostIdentity::assemble(keys, &received, "host-b").unwrap_err();
    assert!(matches!(wrong, BundleError::WrongHolder { .. }), "{wrong}");
    assert_eq!(
        wrong.to_string(),
        "the certificate agent-server.pem is for the agent of host-a, not for the agent of host-b"
    );
    let others = HostIdentity::assemble(HostKeys::generate().unwrap(), &received, "host-a");
    assert!(matches!(others, Err(BundleError::Mismatch { file: "agent-server.pem" })));
}

#[test]
fn certificates_are_renewed_for_the_same_keys() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path();
    let pool = Authority::create().unwrap();
    let identity = HostIdentity::issue(&pool, "host-a").unwrap();
    identity.save(home).unwrap();
    let lent = identity.clone();
    let (agent, qemu) = {
        let keys = identity.keys();
        (keys.agent_request_pem().unwrap(), keys.qemu_request_pem().unwrap())
    };
    let old = identity.server().certificate;
    let foreign = Authority::create().unwrap().issue_host("host-a", &agent, &qemu).unwrap();
    let refused = identity.renew(&foreign, home).unwrap_err();
    assert!(matches!(refused, BundleError::OtherAuthority), "{refused}");
    let swapped = pool.issue_host("host-a", &qemu, &agent).unwrap();
    let refused = identity.renew(&swapped, home).unwrap_err();
    assert!(matches!(refused, BundleError::Mismatch { .. }), "{refused}");
    let others = pool.issue_host("host-b", &agent, &qemu).unwrap();
    let refused = identity.renew(&others, home).unwrap_err();
    assert!(matches!(refused, BundleError::WrongHolder { .. }), "{refused}");
    assert_eq!(lent.server().certificate, old);

    let received = pool.issue_host("host-a", &agent, &qemu).unwrap();
    // Killed in the middle: one file is new, the others are old, and all belong to the keys.
    fs::write(home.join("agent-server.pem"), &received.agent_server).unwrap();
    HostIdentity::load(home).unwrap();
    identity.renew(&received, home).unwrap();
    assert_eq!(lent.server().certificate.to_pem(), received.agent_server, "for all clones");
    let loaded = HostIdentity::load(home).unwrap();
    for (shown, sent) in [
        (loaded.server(), received.agent_server),
        (loaded.client(), received.agent_client),
        (loaded.qemu_server(), received.qemu_server),
        (loaded.qemu_client(), received.qemu_client),
    ] {
        assert_eq!(shown.certificate.to_pem(), sent);
    }
    assert_eq!(mode(&home.join("agent.key")), 0o600);
    assert_eq!(listing(home).len(), 7, "nothing is left beside them");
}

#[test]
fn a_wrong_folder_is_explained() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path();
    let pool = Authority::create().unwrap();
    let save = || HostIdentity::issue(&pool, "host-a").unwrap().save(home).unwrap();
    let load = || HostIdentity::load(home).unwrap_err();

    let missing = load();
    assert!(matches!(missing, BundleError::Files(FilesError::Read { .. })));

    save();
    fs::set_permissions(home.join("qemu.key"), Permissions::from_mode(0o640)).unwrap();
    match load() {
        BundleError::Files(exposed @ FilesError::Exposed { mode: 0o640, .. }) => {
            assert!(exposed.to_string().contains("qemu.key"), "{exposed}");
        }
        other => panic!("{other:?}"),
    }

    save();
    fs::copy(home.join("qemu.key"), home.join("agent.key")).unwrap();
    assert!(matches!(load(), BundleError::Mismatch { file: "agent-server.pem" }));

    save();
    fs::copy(home.join("qemu-server.pem"), home.join("agent-server.pem")).unwrap();
    match load() {
        BundleError::WrongHolder { found, .. } => assert_eq!(found, Peer::Qemu("host-a".into())),
        other => panic!("{other:?}"),
    }

    save();
    fs::write(home.join("ca.pem"), "nonsense").unwrap();
    assert!(matches!(load(), BundleError::Files(FilesError::Certificate { .. })));
    fs::write(home.join("ca.pem"), "x".repeat(20_000)).unwrap();
    assert!(matches!(load(), BundleError::Files(FilesError::TooLong { .. })));
}

#[test]
fn controller_and_operator_save_and_load() {
    let folder = tempfile::tempdir().unwrap();
    let pool = Authority::create().unwrap();
    let home = folder.path().join("controller");
    pool.save(&home).unwrap();
    let controller = ControllerIdentity::issue(&pool).unwrap();
    controller.save(&home).unwrap();
    let loaded = ControllerIdentity::load(&home).unwrap();
    assert_eq!(loaded.ca(), pool.certificate());
    assert_eq!(loaded.client().certificate, controller.client().certificate);
    assert_eq!(loaded.server().certificate, controller.server().certificate);
    assert_eq!(mode(&home.join("controller.key")), 0o600);

    let home = folder.path().join("ann");
    OperatorIdentity::issue(&pool, "ann").unwrap().save(&home).unwrap();
    assert_eq!(OperatorIdentity::load(&home).unwrap().name(), "ann");
    assert_eq!(listing(&home), ["ca.pem", "operator.key", "operator.pem"]);
    assert_eq!(mode(&home.join("operator.key")), 0o600);

    let home = folder.path().join("prometheus");
    MonitorIdentity::issue(&pool, "prometheus").unwrap().save(&home).unwrap();
    assert_eq!(listing(&home), ["ca.pem", MONITOR_KEY, MONITOR_CERTIFICATE]);
    assert_eq!(mode(&home.join(MONITOR_KEY)), 0o600);
}

#[test]
fn a_failed_write_leaves_the_old_file_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path();
    let pool = Authority::create().unwrap();
    // A folder stands where the last file should go: the rename fails.
    fs::create_dir(home.join("ca.pem")).unwrap();
    fs::write(home.join("ca.pem/keep"), "").unwrap();
    let failed = OperatorIdentity::issue(&pool, "ann").unwrap().save(home).unwrap_err();
    assert!(matches!(failed, BundleError::Files(FilesError::Write { .. })));
    assert_eq!(listing(home), ["ca.pem", "operator.key", "operator.pem"]);
}

#[test]
fn qemu_gets_what_it_reads_and_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let pool = Authority::create().unwrap();
    let identity = HostIdentity::issue(&pool, "host-a").unwrap();
    let owner = folder.path().metadata().unwrap();
    let (uid, gid) = match owner.uid() {
        0 => (65_534, 65_533),
        own => (own, owner.gid()),
    };
    for (side, files) in [
        (QemuSide::Server, ["ca-cert.pem", "server-cert.pem", "server-key.pem"]),
        (QemuSide::Client, ["ca-cert.pem", "client-cert.pem", "client-key.pem"]),
    ] {
        let tls = folder.path().join(side.endpoint());
        write_qemu_credentials(&identity, &tls, side, uid, gid).unwrap();
        assert_eq!(listing(&tls), files);
        assert_eq!(mode(&tls), 0o700);
        for path in files.iter().map(|file| tls.join(file)).chain([tls.clone()]) {
            let found = path.metadata().unwrap();
            assert_eq!((found.uid(), found.gid()), (uid, gid), "{}", path.display());
            if path != tls {
                assert_eq!(mode(&path), 0o600, "{}", path.display());
            }
        }
        let again = write_qemu_credentials(&identity, &tls, side, uid, gid).unwrap_err();
        assert!(matches!(again, QemuCredentialsError::Exists { .. }));
        remove_qemu_credentials(&tls).unwrap();
        remove_qemu_credentials(&tls).unwrap();
    }
    assert!(listing(folder.path()).is_empty());
}

#[test]
fn a_failed_layout_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let pool = Authority::create().unwrap();
    let identity = HostIdentity::issue(&pool, "host-a").unwrap();
    let write =
        |path: &Path, uid| write_qemu_credentials(&identity, path, QemuSide::Server, uid, uid);
    let nowhere = folder.path().join("missing/tls");
    let failed = write(&nowhere, 1).unwrap_err();
    assert!(matches!(failed, QemuCredentialsError::Write { .. }));
    // A name that fits, but not while it is being built beside its place.
    let long = folder.path().join("x".repeat(253));
    assert!(write(&long, 65_534).is_err());
    assert!(write(&folder.path().join("tls"), u32::MAX).is_err());
    assert!(listing(folder.path()).is_empty());
}

#[test]
fn what_a_killed_layout_left_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let pool = Authority::create().unwrap();
    let identity = HostIdentity::issue(&pool, "host-a").unwrap();
    let left = folder.path().join(".tls.new");
    fs::create_dir(&left).unwrap();
    fs::write(left.join("server-key.pem"), "half").unwrap();
    let owner = folder.path().metadata().unwrap();
    let tls = folder.path().join("tls");
    write_qemu_credentials(&identity, &tls, QemuSide::Client, owner.uid(), owner.gid()).unwrap();
    assert_eq!(listing(folder.path()), ["tls"]);
    assert_eq!(listing(&tls), ["ca-cert.pem", "client-cert.pem", "client-key.pem"]);
}
