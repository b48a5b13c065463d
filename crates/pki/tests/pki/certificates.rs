//! What the authority writes into certificates, and how names are read back.

use std::collections::HashSet;
use std::os::unix::fs::PermissionsExt as _;
use std::time::SystemTime;

use crate::pool::{DAY, credentials, credentials_within, expired};
use proptest::prelude::*;
use rcgen::{CertificateParams, DnType, KeyPair, PKCS_ECDSA_P384_SHA384};
use whimbrel_pki::authority::{
    AUTHORITY_DAYS, Authority, AuthorityError, CERTIFICATE_DAYS, Role, Validity,
};
use whimbrel_pki::certificate::{Certificate, CertificateError};
use whimbrel_pki::identity::{IdentityError, Peer, check_name, peer_of};
use whimbrel_pki::key::{KeyError, MAX_REQUEST_BYTES, PrivateKey, SubjectKey};
use x509_parser::prelude::{FromDer as _, X509Certificate};

const ROLES: [Role<'static>; 8] = [
    Role::AgentServer("host-a"),
    Role::AgentClient("host-a"),
    Role::QemuServer("host-a"),
    Role::QemuClient("host-a"),
    Role::ControllerServer,
    Role::ControllerClient,
    Role::Operator("ann"),
    Role::Monitor("prometheus"),
];

#[test]
fn every_role_has_its_name_and_exactly_one_usage() {
    let pool = Authority::create().unwrap();
    let names = [
        "host-a.agent.whimbrel",
        "host-a.agent.whimbrel",
        "host-a.qemu.whimbrel",
        "host-a.qemu.whimbrel",
        "controller.whimbrel",
        "controller.whimbrel",
        "ann.operator.whimbrel",
        "prometheus.monitor.whimbrel",
    ];
    let servers = [true, false, true, false, true, false, false, false];
    for ((role, name), server) in ROLES.into_iter().zip(names).zip(servers) {
        let made = credentials(&pool, role).certificate;
        assert_eq!(made.peer().unwrap(), role.peer());
        assert_eq!(role.peer().dns_name(), name);
        let (_, parsed) = X509Certificate::from_der(made.der()).unwrap();
        let usage = parsed.extended_key_usage().unwrap().unwrap().value;
        assert_eq!((usage.server_auth, usage.client_auth), (server, !server), "{role:?}");
        assert!(!usage.any && !usage.code_signing && usage.other.is_empty());
        let key_usage = parsed.key_usage().unwrap().unwrap().value;
        assert!(key_usage.digital_signature() && key_usage.key_encipherment());
        assert!(!key_usage.key_cert_sign());
        assert!(!parsed.is_ca());
    }
}

#[test]
fn qemus_subject_is_the_host_alone() {
    let pool = Authority::create().unwrap();
    for role in [Role::QemuServer("host-a"), Role::QemuClient("host-a")] {
        let made = credentials(&pool, role).certificate;
        let (_, parsed) = X509Certificate::from_der(made.der()).unwrap();
        assert_eq!(parsed.subject().to_string(), "CN=host-a");
    }
    assert_eq!(whimbrel_pki::identity::qemu_subject("host-a"), "CN=host-a");
}

#[test]
fn serial_numbers_are_positive_and_differ() {
    let pool = Authority::create().unwrap();
    let serials: HashSet<Vec<u8>> = (0..50)
        .map(|_| {
            let made = credentials(&pool, Role::AgentServer("host-a")).certificate;
            let (_, parsed) = X509Certificate::from_der(made.der()).unwrap();
            let serial = parsed.raw_serial().to_vec();
            assert!(serial.len() == 16 && serial[0] & 0x80 == 0, "{serial:02x?}");
            serial
        })
        .collect();
    assert_eq!(serials.len(), 50);
}

#[test]
fn days_left_are_counted() {
    let pool = Authority::create().unwrap();
    let now = SystemTime::now();
    let key = PrivateKey::generate().unwrap().subject().unwrap();
    let made = pool.issue(Role::ControllerServer, &key).unwrap();
    let year = i64::try_from(CERTIFICATE_DAYS).unwrap();
    assert!((year - 1..=year).contains(&made.days_left(now)));
    assert!((year - 31..=year - 30).contains(&made.days_left(now + DAY * 30)));
    assert!(made.not_before() < now);
    let ten_years = i64::try_from(AUTHORITY_DAYS).unwrap();
    assert!((ten_years - 1..=ten_years).contains(&pool.certificate().days_left(now)));
    assert_eq!(expired(&pool, Role::ControllerServer, 3).certificate.days_left(now), -4);
}

#[test]
fn nothing_outlives_the_authority() {
    let pool = Authority::create().unwrap();
    let now = SystemTime::now();
    let made = credentials_within(
        &pool,
        Role::ControllerServer,
        Validity::days_from(now, AUTHORITY_DAYS * 2),
    );
    assert_eq!(made.certificate.not_after(), pool.certificate().not_after());
}

#[test]
fn only_the_key_of_a_request_is_used() {
    let pool = Authority::create().unwrap();
    let pair = KeyPair::generate().unwrap();
    let mut asked = CertificateParams::new(vec!["controller.whimbrel".to_owned()]).unwrap();
    asked.distinguished_name.push(DnType::CommonName, "controller.whimbrel");
    asked.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let request = asked.serialize_request(&pair).unwrap().pem().unwrap();
    let key = SubjectKey::from_request_pem(&request).unwrap();
    let made = pool.issue(Role::Operator("ann"), &key).unwrap();
    assert_eq!(made.peer().unwrap(), Peer::Operator("ann".into()));
    let (_, parsed) = X509Certificate::from_der(made.der()).unwrap();
    assert!(!parsed.is_ca());
    let certified = &parsed.public_key().subject_public_key.data;
    assert_eq!(certified.as_ref(), pair.public_key_raw());
}

#[test]
fn bad_requests_are_refused() {
    let read = |text: &str| SubjectKey::from_request_pem(text).unwrap_err();
    assert!(matches!(read(""), KeyError::BadRequest(_)));
    assert!(matches!(read(&"x".repeat(MAX_REQUEST_BYTES + 1)), KeyError::RequestTooLong(_)));
    let pair = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    let other = CertificateParams::default().serialize_request(&pair).unwrap().pem().unwrap();
    assert!(matches!(read(&other), KeyError::RequestAlgorithm));
    // A request whose key was replaced: its signature no longer fits.
    let mut good = PrivateKey::generate().unwrap().request_pem().unwrap();
    let at = good.find("MB").unwrap_or(40) + 100;
    let other = if good.as_bytes()[at] == b'A' { "B" } else { "A" };
    good.replace_range(at..=at, other);
    assert!(matches!(read(&good), KeyError::BadRequest(_)));
}

#[test]
fn names_are_checked_before_anything_is_signed() {
    let pool = Authority::create().unwrap();
    let key = PrivateKey::generate().unwrap().subject().unwrap();
    let long = "a".repeat(64);
    let bad =
        ["", "-a", "a-", "A", "a.b", "a b", "a\n", "ä", "../a", &long, "a,CN=b", "host-a\0", "*"];
    for name in bad {
        for role in [Role::AgentServer(name), Role::QemuClient(name), Role::Operator(name)] {
            let refused = pool.issue(role, &key);
            assert!(matches!(refused, Err(AuthorityError::Name(_))), "{name:?}");
        }
    }
    assert!(check_name(&"a".repeat(63)).is_ok());
}

#[test]
fn strange_certificates_name_nobody() {
    let made = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let params = CertificateParams::new(names).unwrap();
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    };
    let unknown = |name: &str| Err(IdentityError::UnknownName { name: name.to_owned() });
    assert_eq!(peer_of(&made(&[])), Err(IdentityError::NoName));
    assert_eq!(
        peer_of(&made(&["host-a.agent.whimbrel", "controller.whimbrel"])),
        Err(IdentityError::SeveralNames { count: 2 })
    );
    assert_eq!(
        peer_of(&made(&["host-a.agent.whimbrel", "10.0.0.1"])),
        Err(IdentityError::SeveralNames { count: 2 })
    );
    for name in [
        "example.org",
        "whimbrel",
        "agent.whimbrel",
        ".agent.whimbrel",
        "a.b.agent.whimbrel",
        "*.agent.whimbrel",
        "HOST-A.agent.whimbrel",
        "x.controller.whimbrel",
        "controller.whimbrel.org",
        "-a.operator.whimbrel",
    ] {
        assert_eq!(peer_of(&made(&[name])), unknown(name), "{name}");
    }
    assert!(matches!(peer_of(&made(&["10.0.0.1"])), Err(IdentityError::UnknownName { .. })));
    assert_eq!(peer_of(&b"x".as_slice().into()), Err(IdentityError::Unreadable));
}

#[test]
fn pem_holds_exactly_one_certificate() {
    let pool = Authority::create().unwrap();
    let pem = pool.certificate().to_pem();
    assert_eq!(&Certificate::from_pem(&pem).unwrap(), pool.certificate());
    let twice = format!("{pem}{pem}");
    assert!(matches!(Certificate::from_pem(&twice), Err(CertificateError::Several)));
    assert!(matches!(Certificate::from_pem("x"), Err(CertificateError::Pem(_))));
    let long = " ".repeat(17 * 1024);
    assert!(matches!(Certificate::from_pem(&long), Err(CertificateError::TooLong(_))));
    let mut trailing = pool.certificate().der().to_vec();
    trailing.push(0);
    let trailing = Certificate::from_der(trailing.into());
    assert!(matches!(trailing, Err(CertificateError::Malformed)));
}

#[test]
fn an_authority_is_the_same_after_loading() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().join("pool/ca");
    let pool = Authority::create().unwrap();
    pool.save(&home).unwrap();
    let loaded = Authority::load(&home).unwrap();
    assert_eq!(loaded.certificate(), pool.certificate());
    let made = credentials(&loaded, Role::ControllerClient);
    let claims = whimbrel_pki::grant::Claims {
        vm: String::new(),
        migration: String::new(),
        source: String::new(),
        destination: String::new(),
        epoch: 0,
        not_before: 0,
        expires: u64::MAX,
    };
    // The old certificate vouches for what the loaded key signs.
    let signed = whimbrel_pki::grant::SignedGrant::sign(&claims, &made).unwrap();
    signed.verify(pool.certificate(), SystemTime::now()).unwrap();
    let mode = |name: &str| home.join(name).metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("ca.key"), mode("ca.pem")), (0o600, 0o644));
    assert_eq!(home.metadata().unwrap().permissions().mode() & 0o777, 0o700);

    let other = Authority::create().unwrap();
    std::fs::write(home.join("ca.pem"), other.certificate().to_pem()).unwrap();
    assert!(matches!(Authority::load(&home), Err(AuthorityError::Mismatch)));
}

#[test]
fn a_certificate_is_due_in_its_last_third() {
    let pool = Authority::create().unwrap();
    let now = SystemTime::now();
    let validity = Validity { not_before: now, not_after: now + DAY * 30 };
    let made = credentials_within(&pool, Role::AgentServer("host-a"), validity).certificate;
    let hour = DAY / 24;
    assert!(!made.is_renewal_due(now) && !made.is_renewal_due(now + DAY * 20 - hour));
    assert!(made.is_renewal_due(now + DAY * 20 + hour) && made.is_renewal_due(now + DAY * 90));
    assert!(!made.is_expired(now + DAY * 30 - hour) && made.is_expired(now + DAY * 30 + hour));
}

proptest! {
    #[test]
    fn a_peer_survives_its_name(name in "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?") {
        check_name(&name).unwrap();
        let of = [Peer::Agent, Peer::Qemu, Peer::Operator, Peer::Monitor];
        for peer in of.map(|of: fn(String) -> Peer| of(name.clone())) {
            prop_assert_eq!(Peer::from_dns_name(&peer.dns_name()).unwrap(), peer);
        }
    }

    #[test]
    fn no_text_is_two_peers(text in "\\PC{0,80}") {
        if let Ok(peer) = Peer::from_dns_name(&text) {
            prop_assert_eq!(peer.dns_name(), text);
        }
    }
}
