//! Grants: round trip, tampering, and every reason for which one is refused.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::pool::{DAY, credentials};
use proptest::prelude::*;
use whimbrel_pki::authority::{Authority, Role};
use whimbrel_pki::grant::{Claims, GrantError, MAX_CLAIMS_BYTES, SignedGrant};

fn claims() -> Claims {
    let (not_before, expires) = Claims::window(SystemTime::now());
    Claims {
        vm: "4a0d".into(),
        migration: "91c2".into(),
        source: "host-a".into(),
        destination: "host-b".into(),
        epoch: 7,
        not_before,
        expires,
    }
}

fn refused(grant: &SignedGrant, pool: &Authority, now: SystemTime) -> GrantError {
    grant.verify(pool.certificate(), now).unwrap_err()
}

/// The grant as it travels, changed by `change` on the way.
fn tampered(grant: &SignedGrant, change: impl FnOnce(&mut serde_json::Value)) -> SignedGrant {
    let mut value = serde_json::to_value(grant).unwrap();
    change(&mut value);
    serde_json::from_value(value).unwrap()
}

#[test]
fn the_controllers_grant_is_accepted() {
    let pool = Authority::create().unwrap();
    let signed = SignedGrant::sign(&claims(), &credentials(&pool, Role::ControllerClient)).unwrap();
    let sent = serde_json::to_string(&signed).unwrap();
    let received: SignedGrant = serde_json::from_str(&sent).unwrap();
    assert_eq!(received.verify(pool.certificate(), SystemTime::now()).unwrap(), claims());
}

#[test]
fn a_grant_holds_though_the_clocks_differ_by_an_hour() {
    let pool = Authority::create().unwrap();
    let signed = SignedGrant::sign(&claims(), &credentials(&pool, Role::ControllerClient)).unwrap();
    let hour = Duration::from_secs(3600);
    for now in [SystemTime::now() - hour, SystemTime::now() + hour] {
        signed.verify(pool.certificate(), now).unwrap();
    }
}

#[test]
fn the_window_is_kept_to_the_second() {
    let pool = Authority::create().unwrap();
    let claims = claims();
    let signed = SignedGrant::sign(&claims, &credentials(&pool, Role::ControllerClient)).unwrap();
    let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
    let late = refused(&signed, &pool, at(claims.expires));
    assert!(matches!(late, GrantError::Expired { seconds: 0 }));
    assert_eq!(late.code(), "grant-expired");
    signed.verify(pool.certificate(), at(claims.expires - 1)).unwrap();
    signed.verify(pool.certificate(), at(claims.not_before + 1)).unwrap();

    let future = Claims { not_before: claims.expires - 10, ..claims };
    let signed = SignedGrant::sign(&future, &credentials(&pool, Role::ControllerClient)).unwrap();
    let early = refused(&signed, &pool, at(future.not_before - 1));
    assert!(matches!(early, GrantError::NotYetValid { seconds: 1 }));
    assert_eq!(early.code(), "grant-not-yet-valid");
}

#[test]
fn another_pools_grant_is_foreign() {
    let pool = Authority::create().unwrap();
    let other = Authority::create().unwrap();
    let signed =
        SignedGrant::sign(&claims(), &credentials(&other, Role::ControllerClient)).unwrap();
    assert_eq!(refused(&signed, &pool, SystemTime::now()).code(), "grant-foreign");
}

#[test]
fn nobody_but_the_controller_grants() {
    let pool = Authority::create().unwrap();
    let others = [
        Role::AgentClient("host-a"),
        Role::AgentServer("host-a"),
        Role::QemuClient("host-a"),
        Role::Operator("ann"),
        Role::Monitor("prometheus"),
        Role::ControllerServer,
    ];
    for role in others {
        let signed = SignedGrant::sign(&claims(), &credentials(&pool, role)).unwrap();
        let why = refused(&signed, &pool, SystemTime::now());
        assert_eq!(why.code(), "grant-not-from-controller", "{role:?}: {why}");
    }
}

#[test]
fn an_expired_controller_does_not_grant() {
    let pool = Authority::create().unwrap();
    let old = crate::pool::expired(&pool, Role::ControllerClient, 1);
    let signed = SignedGrant::sign(&claims(), &old).unwrap();
    assert_eq!(refused(&signed, &pool, SystemTime::now()).code(), "grant-signer-expired");
}

#[test]
fn a_signature_of_the_wrong_key_is_forged() {
    let pool = Authority::create().unwrap();
    let controller = credentials(&pool, Role::ControllerClient);
    let agent = credentials(&pool, Role::AgentClient("host-a"));
    let good = SignedGrant::sign(&claims(), &controller).unwrap();
    let own = SignedGrant::sign(&claims(), &agent).unwrap();
    // An agent shows the controller's certificate over its own signature.
    let stolen = serde_json::to_value(&good).unwrap()["certificate"].clone();
    let forged = tampered(&own, |value| value["certificate"] = stolen);
    assert_eq!(refused(&forged, &pool, SystemTime::now()).code(), "grant-forged");
}

#[test]
fn malformed_grants_are_named() {
    let pool = Authority::create().unwrap();
    let good = SignedGrant::sign(&claims(), &credentials(&pool, Role::ControllerClient)).unwrap();
    let text = |text: &str| serde_json::Value::String(text.to_owned());
    let cases = [
        tampered(&good, |value| value["signature"] = text("%%%")),
        tampered(&good, |value| value["signature"] = text(&"A".repeat(1000))),
        tampered(&good, |value| value["certificate"] = text("not PEM")),
        tampered(&good, |value| value["claims"] = text(&"x".repeat(MAX_CLAIMS_BYTES + 1))),
    ];
    for case in cases {
        assert_eq!(refused(&case, &pool, SystemTime::now()).code(), "grant-malformed");
    }
    let mut value = serde_json::to_value(&good).unwrap();
    value["extra"] = 1.into();
    assert!(serde_json::from_value::<SignedGrant>(value).is_err());
    let long = Claims { vm: "x".repeat(MAX_CLAIMS_BYTES), ..claims() };
    assert!(SignedGrant::sign(&long, &credentials(&pool, Role::ControllerClient)).is_err());
}

#[test]
fn the_grant_outlives_no_certificate() {
    let pool = Authority::create().unwrap();
    let far = Claims { expires: u64::MAX, ..claims() };
    let signed = SignedGrant::sign(&far, &credentials(&pool, Role::ControllerClient)).unwrap();
    let why = refused(&signed, &pool, SystemTime::now() + DAY * 3);
    assert_eq!(why.code(), "grant-signer-expired");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_claims_survive(
        vm in "\\PC{0,60}", migration in "\\PC{0,60}", source in "\\PC{0,60}",
        destination in "\\PC{0,60}", epoch in any::<u64>(),
    ) {
        let pool = Authority::create().unwrap();
        let (not_before, expires) = Claims::window(SystemTime::now());
        let made = Claims { vm, migration, source, destination, epoch, not_before, expires };
        let signed =
            SignedGrant::sign(&made, &credentials(&pool, Role::ControllerClient)).unwrap();
        prop_assert_eq!(signed.verify(pool.certificate(), SystemTime::now()).unwrap(), made);
    }

    #[test]
    fn no_changed_byte_goes_unnoticed(
        field in prop::sample::select(vec!["claims", "signature"]),
        at in any::<prop::sample::Index>(), with in "[ -~]",
    ) {
        let pool = Authority::create().unwrap();
        let good =
            SignedGrant::sign(&claims(), &credentials(&pool, Role::ControllerClient)).unwrap();
        let changed = tampered(&good, |value| {
            let mut text = value[field].as_str().unwrap().to_owned();
            let at = at.index(text.len());
            text.replace_range(at..=at, &with);
            value[field] = text.into();
        });
        prop_assume!(changed != good);
        prop_assert!(changed.verify(pool.certificate(), SystemTime::now()).is_err());
    }
}
