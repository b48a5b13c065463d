//! Joining, and who may speak to the controller at all.

use std::sync::Arc;

use jiff::Timestamp;
use whimbrel_api::ErrorCode;
use whimbrel_api::client::{PoolClient, Target};
use whimbrel_api::pool::NewJoinToken;
use whimbrel_pki::authority::Authority;
use whimbrel_pki::files::{ControllerIdentity, HostIdentity, HostKeys, OperatorIdentity};
use whimbrel_pki::tls::{self, Credentials};
use whimbrel_pki::token::JoinToken;

use super::rig::Rig;

const ADDRESS: &str = "127.0.0.1:9";

fn client(rig: &Rig, credentials: &Credentials) -> PoolClient {
    let tls = Arc::new(tls::client_config(credentials).unwrap());
    PoolClient::new(Target::Tcp(rig.address.to_string()), tls).unwrap()
}

#[tokio::test]
async fn a_token_is_good_for_one_host_and_may_be_repeated_by_it() {
    let rig = Rig::new().await;
    let token = rig.token().await;
    let (keys, others) = (HostKeys::generate().unwrap(), HostKeys::generate().unwrap());
    rig.join(&token, &keys, "host-a", ADDRESS).await.unwrap();
    rig.join(&token, &keys, "host-a", ADDRESS).await.unwrap();
    let used = rig.join(&token, &others, "host-b", ADDRESS).await.unwrap_err();
    assert_eq!(used.code, ErrorCode::BadToken);
    let taken = rig.join(&rig.token().await, &others, "host-a", ADDRESS).await.unwrap_err();
    assert_eq!(taken.code, ErrorCode::Exists);
    let moved = "127.0.0.1:10";
    rig.join(&rig.token().await, &keys, "host-a", moved).await.unwrap();
    let hosts = rig.client.hosts().await.unwrap();
    assert_eq!((hosts.len(), hosts[0].address.as_str()), (1, moved), "the same key may come again");
}

#[tokio::test]
async fn a_token_that_is_over_or_made_up_admits_nobody() {
    let rig = Rig::new().await;
    let authority = Authority::load(&rig.config().dir).unwrap();
    let keys = HostKeys::generate().unwrap();
    let made_up =
        JoinToken::create(vec![rig.address.to_string()], authority.certificate().fingerprint());
    let token = made_up.unwrap();
    let error = rig.join(&token, &keys, "host-a", ADDRESS).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::BadToken);
    let past = Timestamp::now() - jiff::SignedDuration::from_secs(1);
    rig.controller.store().add_join_token(token.secret().hash(), past, past).await.unwrap();
    let error = rig.join(&token, &keys, "host-a", ADDRESS).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::BadToken);
    assert!(error.message.contains("expired"), "{error}");
    for (name, address) in [("host-a", "nonsense"), ("host-a", "127.0.0.1:0"), ("host-a", ":80")] {
        let error = rig.join(&rig.token().await, &keys, name, address).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::BadRequest, "{address}");
    }
    assert!(rig.client.hosts().await.unwrap().is_empty());
    let eternal = NewJoinToken { ttl_seconds: u32::MAX };
    let error = rig.client.new_join_token(&eternal).await.unwrap_err();
    assert_eq!(error.code, ErrorCode::OutOfRange);
}

#[tokio::test]
async fn only_operators_of_this_pool_are_heard() {
    let rig = Rig::new().await;
    let authority = Authority::load(&rig.config().dir).unwrap();
    let operator = OperatorIdentity::issue(&authority, "ann").unwrap().client();
    client(&rig, &operator).hosts().await.unwrap();
    let agent = HostIdentity::issue(&authority, "host-a").unwrap().client();
    let controller = ControllerIdentity::issue(&authority).unwrap().client();
    for other in [&agent, &controller] {
        let error = client(&rig, other).hosts().await.unwrap_err();
        assert_eq!(error.code, ErrorCode::NotAllowed);
    }
    let stranger = rig.stranger(&rig.token().await);
    assert_eq!(stranger.vms().await.unwrap_err().code, ErrorCode::NotAllowed);

    // Of another pool: with its own authority it does not trust us, with ours it is not trusted.
    let foreign = OperatorIdentity::issue(&Authority::create().unwrap(), "ann").unwrap().client();
    let error = client(&rig, &foreign).hosts().await.unwrap_err();
    assert_eq!(error.code, ErrorCode::CertificateForeign);
    assert!(error.message.contains("not issued by this pool"), "{error}");
    let disguised = Credentials { ca: authority.certificate().clone(), ..foreign };
    let error = client(&rig, &disguised).hosts().await.unwrap_err();
    assert_eq!(error.code, ErrorCode::CertificateForeign);
    assert!(error.message.contains("was not issued by this pool"), "{error}");
}
