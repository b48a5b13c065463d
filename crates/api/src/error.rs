//! What can be answered instead of a result: one stable code for machines, a sentence and a hint for people.
//!
//! A *refusal* (4xx) means that nothing was begun. A *failure* (5xx) means that something was tried. "Unknown" has a
//! code of its own ([`ErrorCode::Unreachable`]): whoever gets it asks again and does not guess. Where it is for a certificate
//! that nobody answers, the code says which trouble it has ([`ErrorCode::of_tls`]).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use whimbrel_migration::preflight::Verdict;
use whimbrel_pki::trouble::TlsTrouble;

macro_rules! error_codes {
    ($( $(#[$doc:meta])* $variant:ident = $code:literal, $status:literal; )*) => {
        /// The stable code of an error. New codes may come; a code never changes its meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
        #[serde(rename_all = "kebab-case")]
        pub enum ErrorCode {
            $( $(#[$doc])* $variant, )*
            /// A code that this version does not know.
            #[serde(other)]
            Unknown,
        }

        impl ErrorCode {
            /// Every code with the HTTP status that carries it.
            pub const ALL: &'static [ErrorCode] = &[$(ErrorCode::$variant),*];

            /// The code as it stands in JSON.
            pub fn as_str(self) -> &'static str {
                match self { $(ErrorCode::$variant => $code,)* ErrorCode::Unknown => "unknown" }
            }

            /// The HTTP status that carries this code.
            pub fn status(self) -> u16 {
                match self { $(ErrorCode::$variant => $status,)* ErrorCode::Unknown => 500 }
            }
        }
    };
}

error_codes! {
    /// The request is not well formed; the message names the field.
    BadRequest = "bad-request", 400;
    /// A name or an id is not of the allowed form.
    BadName = "bad-name", 400;
    /// A number is out of its range.
    OutOfRange = "out-of-range", 400;
    /// A path leaves its storage, or is not a plain file there.
    BadPath = "bad-path", 400;
    /// The disk image cannot be used (format, backing file, damage).
    BadImage = "bad-image", 400;
    /// The body is larger than the limit.
    TooLarge = "too-large", 413;
    /// The caller's certificate has not the role that this call wants.
    NotAllowed = "not-allowed", 403;
    /// The join token or ticket is unknown, used or expired.
    BadToken = "bad-token", 403;
    /// There is no such thing.
    NotFound = "not-found", 404;
    /// There is one of that name already.
    Exists = "exists", 409;
    /// The thing is in a state in which this cannot be done; the message says which.
    WrongState = "wrong-state", 409;
    /// The VM is being migrated, and only the migration may change it.
    Migrating = "migrating", 409;
    /// The guest has been given to the destination; it can no longer be cancelled.
    HandedOver = "handed-over", 409;
    /// Preflight refused the migration; `verdicts` holds every reason.
    PreflightRefused = "preflight-refused", 409;
    /// Something is still used by others; the message lists them.
    InUse = "in-use", 409;
    /// The host has not the memory, space or port that is needed.
    NoResources = "no-resources", 409;
    /// The storage is declared shared, but a token written on one host was not seen on another.
    NotShared = "not-shared", 409;
    /// QEMU refused or failed; the message carries its words.
    Engine = "engine", 502;
    /// A host did not answer: its state is unknown, which is not "failed".
    Unreachable = "unreachable", 503;
    /// The certificate of one of the two ends has expired; the message says whose. Nothing was begun.
    CertificateExpired = "certificate-expired", 503;
    /// A certificate is not valid yet: one of the two clocks is wrong. Nothing was begun.
    CertificateNotYetValid = "certificate-not-yet-valid", 503;
    /// A certificate was not issued by this pool's authority. Nothing was begun.
    CertificateForeign = "certificate-foreign", 503;
    /// Whoever answers is of the pool, and is not who was called. Nothing was begun.
    CertificateWrongName = "certificate-wrong-name", 503;
    /// A certificate is refused for another reason: its role, its purpose, its signature, or there is none. Nothing was begun.
    CertificateRefused = "certificate-refused", 503;
    /// The process is busy beyond a bound; try again.
    Busy = "busy", 503;
    /// A defect or a broken machine: disk full, database unusable.
    Internal = "internal", 500;
}

impl ErrorCode {
    /// The code of a connection that was not made: what is wrong with a certificate, else [`ErrorCode::Unreachable`].
    pub fn of_tls(trouble: &TlsTrouble) -> Self {
        use TlsTrouble as T;
        match trouble {
            T::Expired { .. } => Self::CertificateExpired,
            T::NotYetValid { .. } => Self::CertificateNotYetValid,
            T::UnknownAuthority { .. } => Self::CertificateForeign,
            T::WrongName { .. } => Self::CertificateWrongName,
            T::WrongPurpose { .. }
            | T::NoClientCertificate { .. }
            | T::NoRole { .. }
            | T::BadSignature { .. } => Self::CertificateRefused,
            T::NotTls | T::OldProtocol | T::Closed | T::TimedOut { .. } | T::Handshake { .. } => {
                Self::Unreachable
            }
        }
    }

    /// Whether a certificate is in the way: the request was not heard, and asking again does not help.
    pub fn is_certificate(self) -> bool {
        use ErrorCode as C;
        matches!(
            self,
            C::CertificateExpired
                | C::CertificateNotYetValid
                | C::CertificateForeign
                | C::CertificateWrongName
                | C::CertificateRefused
        )
    }
}

/// The body of every answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// For machines.
    pub code: ErrorCode,
    /// What is the matter, with names and numbers. One sentence.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// With `preflight-refused`: every verdict, refusals and warnings.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub verdicts: Vec<Verdict>,
}

impl ApiError {
    /// An error with a code and a sentence.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, verdicts: Vec::new() }
    }

    /// The same error with advice.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// `not-found` for a thing of a kind ("VM", "host").
    pub fn not_found(kind: &str, name: impl std::fmt::Display) -> Self {
        Self::new(ErrorCode::NotFound, format!("there is no {kind} `{name}`"))
    }

    /// `internal`, with the whole chain of causes in the message.
    pub fn internal(doing: &str, error: &dyn std::error::Error) -> Self {
        Self::new(ErrorCode::Internal, format!("{doing}: {}", chain(error)))
    }

    /// Whether nothing was begun: the request was refused.
    pub fn is_refusal(&self) -> bool {
        (400..500).contains(&self.code.status())
    }

    /// Whether whoever was asked gave no answer: what an earlier request with the same ids has done is unknown.
    pub fn is_unknown(&self) -> bool {
        self.code == ErrorCode::Unreachable || self.code.is_certificate()
    }
}

/// An error with all its causes, `: ` between them.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let next_text = next.to_string();
        if !text.ends_with(&next_text) {
            text.push_str(": ");
            text.push_str(&next_text);
        }
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_reads_the_same_in_json_as_in_code() {
        for code in ErrorCode::ALL {
            let json = serde_json::to_string(code).unwrap();
            assert_eq!(json, format!("\"{}\"", code.as_str()));
            assert!((400..600).contains(&code.status()));
        }
    }

    #[test]
    fn a_newer_servers_code_is_read_as_unknown() {
        let error: ApiError =
            serde_json::from_str(r#"{"code":"from-the-future","message":"m","more":1}"#).unwrap();
        assert_eq!(error.code, ErrorCode::Unknown);
    }
}
