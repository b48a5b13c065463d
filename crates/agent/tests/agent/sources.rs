//! Who may send guests: the destination's own list.

use whimbrel_api::agent::{KnockConnect, KnockListen, OutgoingEnd, Reach};
use whimbrel_api::{ApiError, ErrorCode};

use crate::pair::{Pair, Try, Way};
use crate::place::in_namespace;

/// What becomes of a VM of `a` where `b` has this list: the knock, and the preparation without and after it.
fn tried(list: &'static [&str], judge: impl FnOnce(Tried) + Send + 'static) {
    in_namespace(move || {
        let mut pair = Pair::of(("7.2", "7.2"));
        pair.b.config.migration_sources = list.iter().map(|one| one.parse().unwrap()).collect();
        let (a, _b) = (pair.a.live(), pair.b.live());
        let vm = pair.vm_on(&a);
        let unknocked = prepared(&pair, &pair.try_to_move(vm, &a));
        let knock = pair.calls.block_on(knock(&pair));
        let one = pair.try_to_move(vm, &a);
        let knocked = prepared(&pair, &one);
        if knocked.is_ok() {
            let moved = pair.calls.block_on(async {
                let offer = pair.prepare(&one, &pair.a, &pair.b).await.unwrap();
                pair.send_by(&one, &pair.a, &pair.b, offer, Way::default()).await.unwrap();
                pair.end(&one, &pair.a).await
            });
            assert_eq!(moved, OutgoingEnd::Moved);
        }
        judge(Tried { unknocked, knock, knocked });
    });
}

struct Tried {
    unknocked: Result<(), ApiError>,
    knock: Result<Reach, ApiError>,
    knocked: Result<(), ApiError>,
}

/// A preparation; one that is not refused is taken down, unless it is to be used.
fn prepared(pair: &Pair, one: &Try) -> Result<(), ApiError> {
    let prepared = pair.calls.block_on(pair.prepare(one, &pair.a, &pair.b));
    prepared.map(drop)
}

async fn knock(pair: &Pair) -> Result<Reach, ApiError> {
    let listen = KnockListen { from: pair.a.config.name.clone(), listen: None };
    let address = pair.client(&pair.b).knock_listen(&listen).await?;
    let to = pair.b.config.name.clone();
    pair.client(&pair.a).knock_connect(&KnockConnect { to, address }).await
}

fn not_allowed<T: std::fmt::Debug>(told: Result<T, ApiError>) {
    let error = told.unwrap_err();
    assert_eq!(error.code, ErrorCode::NotAllowed);
    assert!(error.message.starts_with("source-not-allowed"), "{error}");
}

#[test]
fn a_host_that_is_not_listed_is_refused_everywhere() {
    tried(&["c"], |tried| {
        not_allowed(tried.unknocked);
        not_allowed(tried.knock);
        not_allowed(tried.knocked);
    });
}

#[test]
fn a_host_that_knocks_from_elsewhere_is_refused() {
    tried(&["192.0.2.0/24", "c"], |tried| {
        not_allowed(tried.unknocked);
        assert!(matches!(tried.knock.unwrap(), Reach::NotAllowed { .. }));
        not_allowed(tried.knocked);
    });
}

#[test]
fn a_listed_address_is_enough_once_it_is_seen() {
    tried(&["127.0.0.0/8"], |tried| {
        not_allowed(tried.unknocked);
        assert!(matches!(tried.knock.unwrap(), Reach::Open { .. }));
        tried.knocked.unwrap();
    });
}
