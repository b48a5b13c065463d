//! The join token: one printable line that lets one host join, once, within minutes.
//!
//! It carries where the controller is, the authority's fingerprint (so that the host knows the
//! controller before it has any certificate) and a 256-bit secret. The controller keeps only the
//! secret's [`TokenHash`], with the moment of expiry and whether it was used: that bookkeeping is
//! the controller's. The form is
//!
//! ```text
//! whimbrel-join-1.<base64url of: fingerprint 32 | secret 32 | addresses, comma-separated | check 4>
//! ```

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::certificate::{Fingerprint, HexError, parse_hex, sha256};

/// How long a token is good for unless told otherwise, in seconds.
pub const TOKEN_LIFETIME_SECONDS: u64 = 15 * 60;
/// Longest token that is read, in characters.
pub const MAX_TOKEN_CHARS: usize = 2048;
/// Most controller addresses in one token.
pub const MAX_ADDRESSES: usize = 8;
/// Longest address, in characters: a DNS name, a colon and a port.
pub const MAX_ADDRESS_CHARS: usize = 253 + 6;

const PREFIX: &str = "whimbrel-join-1.";
const FAMILY: &str = "whimbrel-join-";
const SECRET_BYTES: usize = 32;
const CHECK_BYTES: usize = 4;
const HASH_CONTEXT: &[u8] = b"whimbrel join secret 1\0";
const CHECK_CONTEXT: &[u8] = b"whimbrel join token 1\0";

/// Why a text is no join token, or a token cannot be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// The text has another beginning.
    #[error("not a join token: it does not begin with {PREFIX:?}")]
    NotAToken,
    /// The text is of another version of the format.
    #[error("the join token is of another version of whimbrel")]
    OtherVersion,
    /// Longer than [`MAX_TOKEN_CHARS`].
    #[error("the join token is longer than {MAX_TOKEN_CHARS} characters")]
    TooLong,
    /// Cut off, or changed on the way.
    #[error("the join token is damaged: it was not copied whole")]
    Damaged,
    /// An address is no `host:port`.
    #[error("{0:?} is not an address of the form host:port")]
    Address(String),
    /// No address, or more than [`MAX_ADDRESSES`].
    #[error("a join token carries 1 to {MAX_ADDRESSES} addresses of the controller, not {0}")]
    AddressCount(usize),
    /// The system gave no random bytes.
    #[error("no random bytes from the system")]
    Random,
}

/// The secret of a token. Shown nowhere; its `Debug` form says nothing.
#[derive(Clone)]
pub struct Secret([u8; SECRET_BYTES]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Secret {
    /// A new secret: 256 bits from the system. For join tokens, and for whoever else needs a ticket that cannot be guessed.
    pub fn generate() -> Result<Self, TokenError> {
        let mut bytes = [0; SECRET_BYTES];
        aws_lc_rs::rand::fill(&mut bytes).map_err(|_| TokenError::Random)?;
        Ok(Self(bytes))
    }

    /// The secret as text, for the join request.
    pub fn to_text(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.0)
    }

    /// Reads the text of a join request.
    pub fn from_text(text: &str) -> Result<Self, TokenError> {
        let mut bytes = [0; SECRET_BYTES];
        match URL_SAFE_NO_PAD.decode_slice(text, &mut bytes) {
            Ok(SECRET_BYTES) => Ok(Self(bytes)),
            _ => Err(TokenError::Damaged),
        }
    }

    /// What the controller stores in place of the secret.
    pub fn hash(&self) -> TokenHash {
        TokenHash(sha256(&[HASH_CONTEXT, &self.0]))
    }
}

/// The hash of a token's secret; 64 hexadecimal digits as text.
#[derive(Clone, Copy)]
pub struct TokenHash([u8; 32]);

impl TokenHash {
    /// Whether this is the hash of `secret`, in a time that does not depend on the answer.
    pub fn matches(&self, secret: &Secret) -> bool {
        verify_slices_are_equal(&self.0, &secret.hash().0).is_ok()
    }
}

impl fmt::Display for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for TokenHash {
    type Err = HexError;

    fn from_str(text: &str) -> Result<Self, HexError> {
        parse_hex(text).map(Self)
    }
}

/// A join token, made or read.
#[derive(Clone, Debug)]
pub struct JoinToken {
    addresses: Vec<String>,
    authority: Fingerprint,
    secret: Secret,
}

impl JoinToken {
    /// Makes a token with a new secret. `addresses` are the controller's, `host:port` each.
    pub fn create(addresses: Vec<String>, authority: Fingerprint) -> Result<Self, TokenError> {
        check_addresses(&addresses)?;
        Ok(Self { addresses, authority, secret: Secret::generate()? })
    }

    /// Where the controller is: `host:port` each, to be tried in turn.
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// The fingerprint of the pool's authority.
    pub fn authority(&self) -> Fingerprint {
        self.authority
    }

    /// The secret that the join request carries.
    pub fn secret(&self) -> &Secret {
        &self.secret
    }

    /// The one line that is handed to the new host. It is a secret.
    pub fn to_line(&self) -> String {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend_from_slice(&self.authority.0);
        bytes.extend_from_slice(&self.secret.0);
        bytes.extend_from_slice(self.addresses.join(",").as_bytes());
        let check = sha256(&[CHECK_CONTEXT, &bytes]);
        bytes.extend_from_slice(&check[..CHECK_BYTES]);
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        if text.len() > MAX_TOKEN_CHARS {
            return Err(TokenError::TooLong);
        }
        let body = text.strip_prefix(PREFIX).ok_or_else(|| {
            if text.starts_with(FAMILY) { TokenError::OtherVersion } else { TokenError::NotAToken }
        })?;
        let bytes = URL_SAFE_NO_PAD.decode(body).map_err(|_| TokenError::Damaged)?;
        let (bytes, check) = bytes.split_last_chunk::<CHECK_BYTES>().ok_or(TokenError::Damaged)?;
        if sha256(&[CHECK_CONTEXT, bytes])[..CHECK_BYTES] != check[..] {
            return Err(TokenError::Damaged);
        }
        let (authority, rest) =
            bytes.split_first_chunk::<{ Fingerprint::BYTES }>().ok_or(TokenError::Damaged)?;
        let (secret, addresses) =
            rest.split_first_chunk::<SECRET_BYTES>().ok_or(TokenError::Damaged)?;
        let addresses = std::str::from_utf8(addresses).map_err(|_| TokenError::Damaged)?;
        let addresses: Vec<String> = addresses.split(',').map(str::to_owned).collect();
        check_addresses(&addresses)?;
        Ok(Self { addresses, authority: Fingerprint(*authority), secret: Secret(*secret) })
    }
}

fn check_addresses(addresses: &[String]) -> Result<(), TokenError> {
    if addresses.is_empty() || addresses.len() > MAX_ADDRESSES {
        return Err(TokenError::AddressCount(addresses.len()));
    }
    match addresses.iter().find(|address| !is_address(address)) {
        None => Ok(()),
        Some(bad) => Err(TokenError::Address(bad.chars().take(MAX_ADDRESS_CHARS).collect())),
    }
}

fn is_address(address: &str) -> bool {
    if let Ok(numeric) = address.parse::<SocketAddr>() {
        return numeric.port() != 0 && !numeric.ip().is_unspecified();
    }
    let Some((host, port)) = address.rsplit_once(':') else {
        return false;
    };
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    address.len() <= MAX_ADDRESS_CHARS
        && host.split('.').all(label)
        && port.bytes().all(|b| b.is_ascii_digit())
        && port.parse::<u16>().is_ok_and(|port| port != 0)
}
