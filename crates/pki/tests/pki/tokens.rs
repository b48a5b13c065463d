//! Join tokens: round trip, every kind of damage, comparison by hash.

use proptest::prelude::*;
use whimbrel_pki::authority::Authority;
use whimbrel_pki::certificate::Fingerprint;
use whimbrel_pki::token::{JoinToken, MAX_TOKEN_CHARS, Secret, TokenError, TokenHash};

fn some_fingerprint() -> Fingerprint {
    "ab".repeat(32).parse().unwrap()
}

fn token() -> JoinToken {
    JoinToken::create(vec!["10.0.0.1:7443".into()], some_fingerprint()).unwrap()
}

#[test]
fn the_controller_recognises_the_secret_by_its_hash() {
    let made = token();
    let stored: TokenHash = made.secret().hash().to_string().parse().unwrap();
    let sent = Secret::from_text(&made.secret().to_text()).unwrap();
    assert!(stored.matches(&sent));
    assert!(!stored.matches(token().secret()));
    assert!("zz".parse::<TokenHash>().is_err());
}

#[test]
fn a_secret_is_not_shown() {
    let made = token();
    let shown = format!("{made:?}");
    assert!(!shown.contains(&made.secret().to_text()), "{shown}");
    assert!(shown.contains("Secret(…)"), "{shown}");
}

#[test]
fn what_is_no_token_is_said_so() {
    let read = |text: &str| text.parse::<JoinToken>().map(|_| ()).unwrap_err();
    assert_eq!(read(""), TokenError::NotAToken);
    assert_eq!(read("hello"), TokenError::NotAToken);
    assert_eq!(read("whimbrel-join-2.AAAA"), TokenError::OtherVersion);
    assert_eq!(read("whimbrel-join-1."), TokenError::Damaged);
    assert_eq!(read("whimbrel-join-1.AAAA"), TokenError::Damaged);
    assert_eq!(read("whimbrel-join-1.ä"), TokenError::Damaged);
    assert_eq!(read(&"w".repeat(MAX_TOKEN_CHARS + 1)), TokenError::TooLong);
    let line = token().to_line();
    assert_eq!(read(&line[..line.len() - 1]), TokenError::Damaged);
}

#[test]
fn spaces_around_a_pasted_token_do_not_matter() {
    let line = token().to_line();
    assert!(format!("  {line}\n").parse::<JoinToken>().is_ok());
}

#[test]
fn addresses_are_checked_when_the_token_is_made() {
    let make = |addresses: &[&str]| {
        let addresses = addresses.iter().map(|&text| text.to_owned()).collect();
        JoinToken::create(addresses, some_fingerprint()).map(|_| ())
    };
    for good in ["10.0.0.1:7443", "[fd00::1]:1", "ctl.example.org:65535", "localhost:80"] {
        assert_eq!(make(&[good]), Ok(()), "{good}");
    }
    let bad = [
        "",
        ":1",
        "10.0.0.1",
        "10.0.0.1:0",
        "0.0.0.0:7443",
        "[::]:7443",
        "host:65536",
        "host:-1",
        "host:+1",
        "a b:1",
        "a,b:1",
        "-a:1",
        "a..b:1",
        "host:",
        "h\u{202e}x:1",
        "../x:1",
    ];
    for bad in bad {
        assert_eq!(make(&[bad]), Err(TokenError::Address(bad.to_owned())), "{bad:?}");
    }
    assert_eq!(make(&[]), Err(TokenError::AddressCount(0)));
    assert_eq!(make(&["a:1"; 9]), Err(TokenError::AddressCount(9)));
    let long = format!("{}:1", vec!["a".repeat(60); 5].join("."));
    assert!(matches!(make(&[&long]), Err(TokenError::Address(_))));
}

#[test]
fn two_tokens_differ() {
    let authority = Authority::create().unwrap().certificate().fingerprint();
    let make = || JoinToken::create(vec!["a:1".into()], authority).unwrap().to_line();
    assert_ne!(make(), make());
}

proptest! {
    #[test]
    fn a_token_survives_its_line(
        addresses in prop::collection::vec("[a-z][a-z0-9]{0,20}\\.[a-z]{2,5}:[1-9][0-9]{0,3}", 1..=8),
        fingerprint in "[0-9a-f]{64}",
    ) {
        let authority: Fingerprint = fingerprint.parse().unwrap();
        let made = JoinToken::create(addresses.clone(), authority).unwrap();
        let line = made.to_line();
        prop_assert!(line.chars().all(|c| c.is_ascii_graphic()) && line.len() <= MAX_TOKEN_CHARS);
        let read: JoinToken = line.parse().unwrap();
        prop_assert_eq!(read.addresses(), &addresses[..]);
        prop_assert_eq!(read.authority(), authority);
        prop_assert!(made.secret().hash().matches(read.secret()));
    }

    #[test]
    fn one_wrong_character_is_noticed(at in any::<prop::sample::Index>(), with in "[A-Za-z0-9_-]") {
        let line = token().to_line();
        let at = at.index(line.len());
        let mut changed = line.clone();
        changed.replace_range(at..=at, &with);
        prop_assume!(changed != line);
        prop_assert!(changed.parse::<JoinToken>().is_err());
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in ".{0,300}") {
        let _ = text.parse::<JoinToken>();
        let _ = format!("whimbrel-join-1.{text}").parse::<JoinToken>();
        let _ = Secret::from_text(&text);
    }
}
