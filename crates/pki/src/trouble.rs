//! What went wrong between two TLS ends, in our own words and with a stable code.
//!
//! In TLS 1.3 a client has finished its handshake before the server looks at the client's
//! certificate; the client then learns of the refusal from an alert on its first read. [`explain`]
//! therefore digs through whole chains of errors (ours, hyper's, an HTTP client's) for what rustls
//! said, and reads alerts as well: with an alert it is *our* certificate that the other side
//! refused. An alert says less than the refusing side knows; [`TlsTrouble::seen_from`] adds what
//! our own certificate tells.

use std::error::Error;
use std::fmt;
use std::io;
use std::time::SystemTime;

use rustls::{AlertDescription, CertificateError, InvalidMessage};
use rustls_pki_types::{ServerName, UnixTime};

use crate::certificate::Certificate;
use crate::identity::IdentityError;

const SECONDS_PER_DAY: u64 = 24 * 60 * 60;
/// Most links of an error's chain that are followed.
const MAX_CHAIN_LINKS: usize = 32;
/// Most names of a certificate that are shown.
const MAX_NAMES_SHOWN: usize = 4;

/// Whose certificate is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// The one that we show; the other side refused it.
    Ours,
    /// The one that the other side shows; we refused it.
    Theirs,
}

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ours => "our certificate",
            Self::Theirs => "the other side's certificate",
        })
    }
}

/// Why two ends did not come together. `Display` is a whole sentence without a full stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TlsTrouble {
    /// A certificate has expired.
    Expired {
        /// Whose.
        whose: Whose,
        /// Whole days since then; `None` if only the other side knows.
        days: Option<u64>,
    },
    /// A certificate is not valid yet: most often a clock that is wrong.
    NotYetValid {
        /// Whose.
        whose: Whose,
        /// Seconds until then.
        seconds: u64,
    },
    /// A certificate is not of this pool: of another pool, or self-signed.
    UnknownAuthority {
        /// Whose.
        whose: Whose,
    },
    /// A certificate is for another name than the one that was called.
    WrongName {
        /// Whose.
        whose: Whose,
        /// The name that was called; `None` if only the other side knows.
        expected: Option<String>,
        /// The names in the certificate, if known.
        got: Vec<String>,
    },
    /// A client's certificate was shown by a server, or the reverse.
    WrongPurpose {
        /// Whose.
        whose: Whose,
    },
    /// The client showed no certificate.
    NoClientCertificate {
        /// `Theirs`: the client's, seen at the door. `Ours`: we are that client.
        whose: Whose,
    },
    /// A certificate of the pool whose holder may not speak here.
    NoRole {
        /// Whose.
        whose: Whose,
        /// Why; `None` if only the other side knows.
        why: Option<IdentityError>,
    },
    /// A signature does not match: a certificate was tampered with, or its key is not there.
    BadSignature {
        /// Whose.
        whose: Whose,
    },
    /// The other side does not speak TLS (plain HTTP, SSH, …).
    NotTls,
    /// The other side speaks no TLS 1.3.
    OldProtocol,
    /// The other side closed the connection without a word.
    Closed,
    /// The other side was silent for too long.
    TimedOut {
        /// How long we waited, in seconds.
        seconds: u64,
    },
    /// Anything else that rustls reports.
    Handshake {
        /// In rustls's words.
        what: String,
    },
}

impl TlsTrouble {
    /// The stable code of this trouble.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Expired { .. } => "tls-expired",
            Self::NotYetValid { .. } => "tls-not-yet-valid",
            Self::UnknownAuthority { .. } => "tls-unknown-authority",
            Self::WrongName { .. } => "tls-wrong-name",
            Self::WrongPurpose { .. } => "tls-wrong-purpose",
            Self::NoClientCertificate { .. } => "tls-no-client-certificate",
            Self::NoRole { .. } => "tls-no-role",
            Self::BadSignature { .. } => "tls-bad-signature",
            Self::NotTls => "tls-not-tls",
            Self::OldProtocol => "tls-old-protocol",
            Self::Closed => "tls-closed",
            Self::TimedOut { .. } => "tls-timed-out",
            Self::Handshake { .. } => "tls-handshake",
        }
    }

    /// Adds what our own certificate says when the other side refused it as out of date: whether
    /// it has expired (and when) or is not valid yet, by our clock.
    pub fn seen_from(self, own: &Certificate, now: SystemTime) -> Self {
        match self {
            Self::Expired { whose: Whose::Ours, .. } => {
                if let Ok(wait) = own.not_before().duration_since(now)
                    && !wait.is_zero()
                {
                    return Self::NotYetValid { whose: Whose::Ours, seconds: wait.as_secs() };
                }
                let days = now.duration_since(own.not_after()).ok();
                let days = days.map(|past| past.as_secs() / SECONDS_PER_DAY);
                Self::Expired { whose: Whose::Ours, days }
            }
            other => other,
        }
    }

    /// The same sentence for whoever is at neither end, and would not know who "we" are: `ours` and `theirs` say it
    /// ("the controller", "host-b").
    pub fn between(&self, ours: &str, theirs: &str) -> String {
        let words = Words {
            we: ours,
            they: theirs,
            our_certificate: format!("the certificate of {ours}"),
            their_certificate: format!("the certificate of {theirs}"),
        };
        Between { trouble: self, words }.to_string()
    }
}

impl fmt::Display for TlsTrouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = Words {
            we: "we",
            they: "the other side",
            our_certificate: Whose::Ours.to_string(),
            their_certificate: Whose::Theirs.to_string(),
        };
        words.tell(self, f)
    }
}

/// A trouble in words for whoever is at neither end; see [`TlsTrouble::between`].
struct Between<'a> {
    trouble: &'a TlsTrouble,
    words: Words<'a>,
}

impl fmt::Display for Between<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.words.tell(self.trouble, f)
    }
}

/// How the two ends are called.
struct Words<'a> {
    we: &'a str,
    they: &'a str,
    our_certificate: String,
    their_certificate: String,
}

impl Words<'_> {
    fn of(&self, whose: Whose) -> &str {
        match whose {
            Whose::Ours => &self.our_certificate,
            Whose::Theirs => &self.their_certificate,
        }
    }

    fn tell(&self, trouble: &TlsTrouble, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        use TlsTrouble as T;
        let Self { we, they, .. } = self;
        match trouble {
            T::Expired { whose, days } => self.expired(*whose, *days, f),
            T::NotYetValid { whose, seconds } => {
                let certificate = self.of(*whose);
                write!(f, "{certificate} is valid in {seconds} s only; compare the two clocks")
            }
            T::UnknownAuthority { whose } => write!(
                f,
                "{} was not issued by this pool's authority (it is of another pool, or self-signed)",
                self.of(*whose)
            ),
            T::WrongName { whose, expected, got } => self.wrong_name(*whose, expected, got, f),
            T::WrongPurpose { whose } => write!(
                f,
                "{} is for the other end of a connection (a client's where a server's is needed, \
                 or the reverse)",
                self.of(*whose)
            ),
            T::NoClientCertificate { whose: Whose::Theirs } => {
                f.write_str("the client showed no certificate")
            }
            T::NoClientCertificate { whose: Whose::Ours } => {
                write!(f, "{they} wants a certificate of its pool, and {we} showed none")
            }
            T::NoRole { whose, why: Some(why) } => {
                write!(f, "{} is refused: {why}", self.of(*whose))
            }
            T::NoRole { whose, why: None } => {
                let certificate = self.of(*whose);
                write!(f, "{certificate} is of the pool, but its holder may not speak here")
            }
            T::BadSignature { whose } => write!(
                f,
                "{} or its proof carries a signature that does not match; it was tampered with, \
                 or its key belongs to another certificate",
                self.of(*whose)
            ),
            T::NotTls => write!(f, "{they} does not speak TLS"),
            T::OldProtocol => write!(f, "{they} does not speak TLS 1.3"),
            T::Closed => write!(f, "{they} closed the connection without a word"),
            T::TimedOut { seconds } => write!(f, "{they} was silent for {seconds} s"),
            T::Handshake { what } => write!(f, "the TLS handshake failed: {what}"),
        }
    }

    fn expired(&self, whose: Whose, days: Option<u64>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let certificate = self.of(whose);
        match (days, whose) {
            (Some(0), _) => write!(f, "{certificate} has expired today; renew it"),
            (Some(days), _) => write!(f, "{certificate} expired {days} days ago; renew it"),
            (None, Whose::Theirs) => write!(f, "{certificate} has expired; renew it"),
            (None, Whose::Ours) => write!(
                f,
                "{} says that {certificate} is out of date, though by our clock it is not; \
                 compare the two clocks",
                self.they
            ),
        }
    }

    fn wrong_name(
        &self,
        whose: Whose,
        expected: &Option<String>,
        got: &[String],
        f: &mut fmt::Formatter<'_>,
    ) -> fmt::Result {
        let whose = self.of(whose);
        match (expected, got) {
            (Some(expected), []) => write!(f, "{whose} is not for {expected}, which was called"),
            (Some(expected), got) => {
                write!(f, "{whose} is for {}, not for {expected}, which was called", got.join(", "))
            }
            (None, _) => write!(f, "{whose} is not for the name that {} called", self.they),
        }
    }
}

/// Finds out what went wrong from any error of a connection: walks its chain, looking inside
/// `io::Error`s too, for what TLS has to say. `None` if TLS has nothing to do with it.
pub fn explain(error: &(dyn Error + 'static)) -> Option<TlsTrouble> {
    let mut next = Some(error);
    let mut closed = None;
    for _ in 0..MAX_CHAIN_LINKS {
        let Some(link) = next else { break };
        if let Some(tls) = link.downcast_ref::<rustls::Error>() {
            return Some(of_rustls(tls));
        }
        next = link.source();
        if let Some(io) = link.downcast_ref::<io::Error>() {
            if io.kind() == io::ErrorKind::UnexpectedEof {
                closed = Some(TlsTrouble::Closed);
            }
            // `io::Error::source` skips the error that it wraps.
            if let Some(inner) = io.get_ref() {
                next = Some(inner as &(dyn Error + 'static));
            }
        }
    }
    closed
}

fn of_rustls(error: &rustls::Error) -> TlsTrouble {
    use rustls::Error as E;
    match error {
        E::InvalidCertificate(why) => of_certificate(why),
        E::AlertReceived(alert) => of_alert(*alert),
        E::NoCertificatesPresented => TlsTrouble::NoClientCertificate { whose: Whose::Theirs },
        E::InvalidMessage(
            InvalidMessage::InvalidContentType
            | InvalidMessage::UnknownProtocolVersion
            | InvalidMessage::MessageTooLarge,
        ) => TlsTrouble::NotTls,
        E::PeerIncompatible(_) => TlsTrouble::OldProtocol,
        other => TlsTrouble::Handshake { what: other.to_string() },
    }
}

/// We refused the other side's certificate.
fn of_certificate(error: &CertificateError) -> TlsTrouble {
    use CertificateError as C;
    let whose = Whose::Theirs;
    match error {
        C::Expired => TlsTrouble::Expired { whose, days: None },
        C::ExpiredContext { time, not_after } => {
            let days = Some(seconds_between(*not_after, *time) / SECONDS_PER_DAY);
            TlsTrouble::Expired { whose, days }
        }
        C::NotValidYet => TlsTrouble::NotYetValid { whose, seconds: 0 },
        C::NotValidYetContext { time, not_before } => {
            TlsTrouble::NotYetValid { whose, seconds: seconds_between(*time, *not_before) }
        }
        C::UnknownIssuer => TlsTrouble::UnknownAuthority { whose },
        C::BadSignature => TlsTrouble::BadSignature { whose },
        C::NotValidForName => TlsTrouble::WrongName { whose, expected: None, got: Vec::new() },
        C::NotValidForNameContext { expected, presented } => TlsTrouble::WrongName {
            whose,
            expected: Some(name_text(expected)),
            got: presented.iter().take(MAX_NAMES_SHOWN).map(|name| dns_text(name)).collect(),
        },
        C::InvalidPurpose | C::InvalidPurposeContext { .. } => TlsTrouble::WrongPurpose { whose },
        C::Other(other) => of_other(&*other.0),
        other => TlsTrouble::Handshake { what: other.to_string() },
    }
}

fn of_other(error: &(dyn Error + Send + Sync + 'static)) -> TlsTrouble {
    let whose = Whose::Theirs;
    match error.downcast_ref::<IdentityError>() {
        Some(why) => TlsTrouble::NoRole { whose, why: Some(why.clone()) },
        // A self-signed certificate that calls itself an authority ends up here; rustls gives no
        // type to match on.
        None if error.to_string().contains("CaUsedAsEndEntity") => {
            TlsTrouble::UnknownAuthority { whose }
        }
        None => TlsTrouble::Handshake { what: error.to_string() },
    }
}

/// The other side refused us. rustls (0.23) sends `CertificateExpired` for "not yet valid" too,
/// `BadCertificate` for a wrong name, and `CertificateUnknown` for our own check of roles.
fn of_alert(alert: AlertDescription) -> TlsTrouble {
    use AlertDescription as A;
    let whose = Whose::Ours;
    match alert {
        A::CertificateExpired => TlsTrouble::Expired { whose, days: None },
        A::UnknownCA => TlsTrouble::UnknownAuthority { whose },
        A::BadCertificate | A::UnrecognisedName => {
            TlsTrouble::WrongName { whose, expected: None, got: Vec::new() }
        }
        A::UnsupportedCertificate => TlsTrouble::WrongPurpose { whose },
        A::CertificateRequired | A::NoCertificate => TlsTrouble::NoClientCertificate { whose },
        A::CertificateUnknown | A::AccessDenied => TlsTrouble::NoRole { whose, why: None },
        A::DecryptError => TlsTrouble::BadSignature { whose },
        A::ProtocolVersion => TlsTrouble::OldProtocol,
        A::CloseNotify | A::UserCanceled => TlsTrouble::Closed,
        other => TlsTrouble::Handshake { what: format!("the other side sent the alert {other:?}") },
    }
}

fn seconds_between(from: UnixTime, to: UnixTime) -> u64 {
    to.as_secs().saturating_sub(from.as_secs())
}

fn name_text(name: &ServerName<'_>) -> String {
    name.to_str().into_owned()
}

/// webpki (0.103) presents names as `DnsName("host-a…")`.
fn dns_text(presented: &str) -> String {
    presented
        .strip_prefix("DnsName(\"")
        .and_then(|rest| rest.strip_suffix("\")"))
        .unwrap_or(presented)
        .chars()
        .filter(|c| !c.is_control())
        .collect()
}
