//! Which features a QEMU has, decided by its own description of QMP (`query-qmp-schema`).
//!
//! Never by its version: distributors backport and leave out. The description is one list of
//! types that refer to each other by meaningless names; [`Schema`] follows them, [`Features`] is
//! what the rest of the crate asks.

mod sent;

use std::collections::{BTreeSet, HashMap};

use serde_json::{Value, json};

pub use self::sent::{SENT, SENT_WHERE_KNOWN, Sent};
use crate::qmp::{Qmp, QmpError};

/// How many types deep an argument may be nested before we stop following the references.
const TYPE_DEPTH_MAX: usize = 16;

/// What this QEMU can do, of what we would use where it exists.
///
/// The comments name the versions among 7.2 and 10.0 that have a feature, for orientation only.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Features {
    /// Several connections for one migration (7.2, 10.0).
    pub multifd: bool,
    /// What multifd can compress by: `none`, `zlib`, `zstd` (7.2, 10.0), and what a build has more.
    pub multifd_compressions: BTreeSet<String>,
    /// Pages sent again are sent as differences (7.2, 10.0).
    pub xbzrle: bool,
    /// A guest that writes too fast is held back (7.2, 10.0).
    pub auto_converge: bool,
    /// Memory is sent without a copy inside the kernel (7.2, 10.0; where the system can).
    pub zero_copy_send: bool,
    /// The guest may be moved before its memory (7.2, 10.0). Whether the host lets QEMU *receive*
    /// so is another question: [`crate::engine::EngineFacts::postcopy_obstacle`].
    pub postcopy: bool,
    /// Pages that the guest waits for overtake the others (7.2, 10.0).
    pub postcopy_preempt: bool,
    /// The destination counts how long the guest waits for pages (7.2, 10.0).
    pub postcopy_blocktime: bool,
    /// A migration may go to a file by its name (10.0).
    pub file_transport: bool,
    /// Every page has a place of its own in such a file (10.0).
    pub mapped_ram: bool,
    /// How the rate of writing can be measured: `page-sampling`, `dirty-bitmap`, `dirty-ring`
    /// (7.2, 10.0).
    pub dirty_rate_modes: BTreeSet<String>,
    /// Such a measuring may take parts of a second (10.0).
    pub dirty_rate_in_milliseconds: bool,
    /// `migrate` takes a list of channels instead of an address (10.0).
    pub channels: bool,
    /// The destination says when it is ready for the switchover (10.0).
    pub switchover_ack: bool,
    /// `migrate-incoming` can be told to stay after a failure, and to say why (10.0).
    pub exit_on_error: bool,
    /// The two ends compare the VM's uuid (7.2, 10.0).
    pub validate_uuid: bool,
    /// The bandwidth assumed for the switchover can be given (10.0).
    pub avail_switchover_bandwidth: bool,
    /// Where zero pages are found can be chosen (10.0).
    pub zero_page_detection: bool,
    /// A guest whose disks are inactive can be sent: 10.0, which can also be told to make disks
    /// active or not (`blockdev-set-active` is the sign). 7.2 ends with a failed assertion.
    pub sends_inactive_disks: bool,
    /// A mirror that copies in the background can be told to take part in the guest's writes (10.0).
    pub mirror_mode_changes: bool,
    /// Every migration capability by its name, for the comparison of two ends.
    pub migration_capabilities: BTreeSet<String>,
}

impl Features {
    /// Asks a QEMU.
    ///
    /// # Errors
    ///
    /// [`QmpError`] of `query-qmp-schema`.
    pub async fn query(qmp: &Qmp) -> Result<Self, QmpError> {
        Ok(Self::of(&Schema::query(qmp).await?))
    }

    /// Reads them from a description.
    #[must_use]
    pub fn of(schema: &Schema) -> Self {
        let migration_capabilities =
            schema.words("migrate-set-capabilities", "capabilities/capability");
        let has = |name: &str| migration_capabilities.contains(name);
        let takes = |argument: &str| schema.has_argument("migrate-set-parameters", argument);
        Self {
            multifd: has("multifd"),
            multifd_compressions: schema.words("migrate-set-parameters", "multifd-compression"),
            xbzrle: has("xbzrle"),
            auto_converge: has("auto-converge"),
            zero_copy_send: has("zero-copy-send"),
            postcopy: has("postcopy-ram"),
            postcopy_preempt: has("postcopy-preempt"),
            postcopy_blocktime: has("postcopy-blocktime"),
            file_transport: schema.words("migrate", "channels/addr/transport").contains("file"),
            mapped_ram: has("mapped-ram"),
            dirty_rate_modes: schema.words("calc-dirty-rate", "mode"),
            dirty_rate_in_milliseconds: schema.has_argument("calc-dirty-rate", "calc-time-unit"),
            channels: schema.has_argument("migrate", "channels"),
            switchover_ack: has("switchover-ack"),
            exit_on_error: schema.has_argument("migrate-incoming", "exit-on-error"),
            validate_uuid: has("validate-uuid"),
            avail_switchover_bandwidth: takes("avail-switchover-bandwidth"),
            zero_page_detection: takes("zero-page-detection"),
            sends_inactive_disks: schema.has_command("blockdev-set-active"),
            mirror_mode_changes: schema
                .words("block-job-change", "copy-mode")
                .contains("write-blocking"),
            migration_capabilities,
        }
    }
}

/// A QEMU's own description of its commands.
#[derive(Debug, Clone, Default)]
pub struct Schema {
    entities: HashMap<String, Value>,
}

impl Schema {
    /// Asks a QEMU.
    ///
    /// # Errors
    ///
    /// [`QmpError`] of `query-qmp-schema`.
    pub async fn query(qmp: &Qmp) -> Result<Self, QmpError> {
        const COMMAND: &str = "query-qmp-schema";
        let answer = qmp.execute(COMMAND, Value::Null).await?;
        let Value::Array(list) = answer else {
            return Err(QmpError::malformed(COMMAND, "not a list"));
        };
        Ok(Self::from_list(list))
    }

    /// Reads the list that `query-qmp-schema` returns; entries without a name are left out.
    #[must_use]
    pub fn from_list(list: Vec<Value>) -> Self {
        let named = |entity: Value| {
            let name = entity.get("name").and_then(Value::as_str)?.to_owned();
            Some((name, entity))
        };
        Self { entities: list.into_iter().filter_map(named).collect() }
    }

    /// Whether there is such a command.
    #[must_use]
    pub fn has_command(&self, command: &str) -> bool {
        self.command(command).is_some()
    }

    /// Whether the command takes the argument; `a/b` means member `b` within argument `a`, and
    /// lists count as their elements. Of variants, any will do.
    #[must_use]
    pub fn has_argument(&self, command: &str, path: &str) -> bool {
        !self.argument(command, path).is_empty()
    }

    /// The words that an argument may have; empty where it is no enumeration or does not exist.
    #[must_use]
    pub fn words(&self, command: &str, path: &str) -> BTreeSet<String> {
        let types = self.argument(command, path);
        let entities = types.into_iter().filter_map(|name| self.element(name));
        // `values` is what 7.2 tells too; `members` came beside it in 6.1.
        let values = entities.filter_map(|entity| entity.get("values")?.as_array()).flatten();
        values.filter_map(|value| value.as_str().map(str::to_owned)).collect()
    }

    fn command(&self, name: &str) -> Option<&Value> {
        let entity = self.entities.get(name)?;
        (entity.get("meta-type") == Some(&json!("command"))).then_some(entity)
    }

    /// The names of an argument's types: one, but where variants differ in it.
    fn argument(&self, command: &str, path: &str) -> BTreeSet<&str> {
        let whole = self.command(command).and_then(|entity| entity.get("arg-type")?.as_str());
        let mut types: BTreeSet<&str> = whole.into_iter().collect();
        for member in path.split('/') {
            let mut found = BTreeSet::new();
            for of_type in types {
                self.member(of_type, member, TYPE_DEPTH_MAX, &mut found);
            }
            types = found;
        }
        types
    }

    /// Finds the types of a member of an object type, of its variants, or of an alternate's branches.
    fn member<'a>(
        &'a self,
        of_type: &str,
        name: &str,
        depth: usize,
        found: &mut BTreeSet<&'a str>,
    ) {
        let (Some(depth), Some(entity)) = (depth.checked_sub(1), self.element(of_type)) else {
            return;
        };
        let parts = |key: &str| {
            entity.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
        };
        let type_of = |part: &'a Value| part.get("type").and_then(Value::as_str);
        let named = |part: &&Value| part.get("name").and_then(Value::as_str) == Some(name);
        found.extend(parts("members").iter().filter(named).filter_map(type_of));
        let alternate = entity.get("meta-type") == Some(&json!("alternate"));
        let branches =
            parts("variants").iter().chain(if alternate { parts("members") } else { &[] });
        for branch in branches.filter_map(type_of) {
            self.member(branch, name, depth, found);
        }
    }

    /// A type, or the type of its elements where it is a list.
    fn element(&self, name: &str) -> Option<&Value> {
        let mut entity = self.entities.get(name)?;
        for _ in 0..TYPE_DEPTH_MAX {
            match entity.get("element-type").and_then(Value::as_str) {
                Some(element) => entity = self.entities.get(element)?,
                None => return Some(entity),
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema() -> Schema {
        Schema::from_list(vec![
            json!({"name": "migrate", "meta-type": "command", "arg-type": "1"}),
            json!({"name": "1", "meta-type": "object", "tag": "kind", "members": [
                {"name": "kind", "type": "2"}, {"name": "list", "type": "3"}],
                "variants": [{"case": "a", "type": "5"}]}),
            json!({"name": "2", "meta-type": "enum", "values": ["a", "b"]}),
            json!({"name": "3", "meta-type": "array", "element-type": "4"}),
            json!({"name": "4", "meta-type": "object", "members": [{"name": "word", "type": "2"}]}),
            json!({"name": "5", "meta-type": "object", "members": [{"name": "extra", "type": "str"}]}),
            json!({"name": "loop", "meta-type": "command", "arg-type": "6"}),
            json!({"name": "6", "meta-type": "object", "members": [],
                "variants": [{"case": "a", "type": "6"}]}),
            json!({"name": "7", "meta-type": "array", "element-type": "7"}),
            json!({"name": "add", "meta-type": "command", "arg-type": "8"}),
            json!({"name": "8", "meta-type": "object", "members": [],
                "variants": [{"case": "a", "type": "9"}, {"case": "b", "type": "10"}]}),
            json!({"name": "9", "meta-type": "object", "members": [{"name": "data", "type": "5"}]}),
            json!({"name": "10", "meta-type": "object", "members": [{"name": "data", "type": "4"}]}),
            json!({"nameless": true}),
        ])
    }

    #[test]
    fn references_are_followed_through_lists_and_variants() {
        let schema = schema();
        assert!(schema.has_command("migrate") && !schema.has_command("1"));
        assert!(schema.has_argument("migrate", "kind"));
        assert!(schema.has_argument("migrate", "extra"));
        assert!(schema.has_argument("migrate", "list/word"));
        assert!(!schema.has_argument("migrate", "word"));
        let words: Vec<String> = schema.words("migrate", "list/word").into_iter().collect();
        assert_eq!(words, ["a", "b"]);
        assert!(schema.words("migrate", "list").is_empty());
        assert!(!schema.has_argument("nothing", "at-all"));
        // Each variant has a member of one name, with other members below it.
        assert!(
            schema.has_argument("add", "data/extra") && schema.has_argument("add", "data/word")
        );
        assert!(!schema.has_argument("add", "data/kind"));
    }

    #[test]
    fn a_description_that_refers_to_itself_ends() {
        let schema = schema();
        assert!(!schema.has_argument("loop", "x"));
        assert!(schema.element("7").is_none());
    }
}
