//! Names and numbers that identify things: VMs, hosts, networks, storages, migrations, epochs.
//!
//! Everything that a user or a peer can spell is checked here, once, when it enters the program
//! (parsing or deserialising); behind this door a `Name` is known to be safe in a path component,
//! in a QEMU option and on a terminal. No look-ups are done here. Called by every crate.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// Most bytes that a [`Name`] may have.
pub const NAME_MAX_BYTES: usize = 63;

/// The name of a VM, host, network, storage or disk: `[a-z0-9-]{1,63}` without a `-` at its ends.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(try_from = "String", into = "String")]
#[schema(
    value_type = String,
    pattern = "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
    min_length = 1,
    max_length = 63,
    example = "web01"
)]
pub struct Name(String);

/// Why a text is no [`Name`]. The message never echoes the text itself: it may hold control
/// characters or be a megabyte long.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// The text has no characters.
    #[error("a name cannot be empty; use a-z, 0-9 and '-'")]
    Empty,
    /// The text has more than [`NAME_MAX_BYTES`] bytes.
    #[error("a name has at most {NAME_MAX_BYTES} characters, this one has {bytes} bytes")]
    TooLong {
        /// Length of the refused text in bytes.
        bytes: usize,
    },
    /// A character outside `[a-z0-9-]`.
    #[error(
        "a name has only a-z, 0-9 and '-'; character {position} is {}",
        describe_char(*character)
    )]
    BadCharacter {
        /// Place of the first refused character, counted from 1.
        position: usize,
        /// The refused character.
        character: char,
    },
    /// The text begins or ends with `-`.
    #[error("a name cannot begin or end with '-'")]
    DashAtEnd,
}

fn describe_char(c: char) -> String {
    if c.is_ascii_graphic() { format!("'{c}'") } else { format!("U+{:04X}", u32::from(c)) }
}

impl Name {
    /// Checks `text` and makes it a name.
    ///
    /// # Errors
    /// Says which rule the text breaks.
    pub fn new(text: impl Into<String>) -> Result<Self, NameError> {
        let text = text.into();
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > NAME_MAX_BYTES {
            return Err(NameError::TooLong { bytes: text.len() });
        }
        let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if let Some((index, character)) = text.chars().enumerate().find(|(_, c)| !allowed(*c)) {
            return Err(NameError::BadCharacter { position: index + 1, character });
        }
        if text.starts_with('-') || text.ends_with('-') {
            return Err(NameError::DashAtEnd);
        }
        Ok(Self(text))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        // Checked before it is copied: the text may be huge.
        if text.len() > NAME_MAX_BYTES {
            return Err(NameError::TooLong { bytes: text.len() });
        }
        Self::new(text)
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        Self::new(text)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl AsRef<str> for Name {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $make:expr) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
        )]
        #[serde(transparent)]
        #[schema(value_type = String, format = Uuid)]
        pub struct $name(Uuid);

        impl $name {
            /// A new id, different from every other.
            #[must_use]
            #[allow(clippy::new_without_default)] // a default id would be a new one each time
            pub fn new() -> Self {
                Self($make)
            }

            /// The id as a UUID.
            #[must_use]
            pub const fn as_uuid(&self) -> &Uuid {
                &self.0
            }
        }

        impl From<Uuid> for $name {
            fn from(uuid: Uuid) -> Self {
                Self(uuid)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                Uuid::try_parse(text).map(Self).map_err(IdError)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

/// Why a text is no id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an id is a UUID, such as 01890a5d-ac96-774b-bcce-b302099a8057")]
pub struct IdError(#[source] uuid::Error);

uuid_id!(
    /// Identifies a VM for ever, whatever its name and host.
    VmId,
    Uuid::new_v4()
);
uuid_id!(
    /// Identifies one try to move one VM. Made by whoever asks for the move, so that a repeated
    /// request is the same request; sorts by time (UUID version 7). Never used for a second try.
    MigrationId,
    Uuid::now_v7()
);

/// How many times a VM has changed hands, or could have: every ownership of a VM has its own,
/// strictly rising epoch. A VM is created in [`Epoch::FIRST`].
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch in which a VM is created.
    pub const FIRST: Self = Self(1);

    /// The epoch after this one.
    ///
    /// Saturates: 2^64 migrations do not happen.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn good_names_pass() {
        for text in ["a", "0", "web01", "a-b", "a--b", &"x".repeat(63)] {
            assert_eq!(Name::new(text).unwrap().as_str(), text);
        }
    }

    #[test]
    fn bad_names_say_what_is_wrong_and_echo_nothing_dangerous() {
        for (text, error) in [
            ("", NameError::Empty),
            (&"x".repeat(64), NameError::TooLong { bytes: 64 }),
            ("-a", NameError::DashAtEnd),
            ("a-", NameError::DashAtEnd),
            ("-", NameError::DashAtEnd),
            ("../x", NameError::BadCharacter { position: 1, character: '.' }),
            ("web\u{1b}[31m", NameError::BadCharacter { position: 4, character: '\u{1b}' }),
            ("Web", NameError::BadCharacter { position: 1, character: 'W' }),
            ("a\u{202e}b", NameError::BadCharacter { position: 2, character: '\u{202e}' }),
            ("a,b=c", NameError::BadCharacter { position: 2, character: ',' }),
        ] {
            let found = Name::new(text).unwrap_err();
            assert_eq!(found, error);
            assert_eq!(text.parse::<Name>().unwrap_err(), error);
            assert!(found.to_string().chars().all(|c| c == ' ' || c.is_ascii_graphic()));
        }
    }

    #[test]
    fn deserialising_checks() {
        assert_eq!(serde_json::from_str::<Name>("\"web01\"").unwrap().as_str(), "web01");
        assert!(serde_json::from_str::<Name>("\"web 01\"").is_err());
        assert!(serde_json::from_str::<VmId>("\"nonsense\"").is_err());
    }

    #[test]
    fn ids_round_trip_and_migrations_sort_by_time() {
        let (first, second) = (MigrationId::new(), MigrationId::new());
        assert!(first <= second);
        assert_eq!(first.to_string().parse::<MigrationId>().unwrap(), first);
        let json = serde_json::to_string(&first).unwrap();
        assert_eq!(json, format!("\"{first}\""));
        assert!("".parse::<VmId>().is_err());
    }

    proptest! {
        #[test]
        fn only_the_pattern_passes(text in "\\PC{0,70}") {
            let matches = !text.is_empty() && text.len() <= 63
                && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
                && !text.starts_with('-') && !text.ends_with('-');
            prop_assert_eq!(Name::new(text).is_ok(), matches);
        }

        #[test]
        fn every_name_of_the_pattern_passes(text in "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?") {
            prop_assert!(Name::new(text).is_ok());
        }
    }
}
