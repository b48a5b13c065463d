//! All that this crate sends, as data: what the contract test looks for in each QEMU, and what
//! the fake takes.

/// One command as it is sent.
#[derive(Debug, Clone, Copy)]
pub struct Sent {
    /// Its name.
    pub command: &'static str,
    /// Its arguments; `a/b` is member `b` of argument `a`.
    pub arguments: &'static [&'static str],
    /// The words sent for arguments that take words.
    pub words: &'static [(&'static str, &'static [&'static str])],
}

const fn plain(command: &'static str) -> Sent {
    Sent { command, arguments: &[], words: &[] }
}

/// Everything that is sent to every QEMU. The one thing that is sent only where the schema has it
/// is `exit-on-error` of `migrate-incoming`.
pub const SENT: &[Sent] = &[
    Sent { command: "qmp_capabilities", arguments: &[], words: &[("enable", &["oob"])] },
    plain("query-qmp-schema"),
    plain("query-machines"),
    plain("query-cpu-definitions"),
    Sent {
        command: "query-cpu-model-expansion",
        arguments: &["model/name"],
        words: &[("type", &["full"])],
    },
    plain("query-uuid"),
    plain("query-status"),
    plain("query-block"),
    plain("query-jobs"),
    plain("query-memory-size-summary"),
    plain("query-migrate"),
    plain("cont"),
    plain("stop"),
    plain("quit"),
    plain("system_powerdown"),
    plain("system_reset"),
    Sent { command: "announce-self", arguments: &["initial", "max", "rounds", "step"], words: &[] },
    Sent {
        command: "object-add",
        arguments: &["id", "dir", "verify-peer", "identity"],
        words: &[
            ("qom-type", &["tls-creds-x509", "authz-simple"]),
            ("endpoint", &["server", "client"]),
        ],
    },
    Sent { command: "object-del", arguments: &["id"], words: &[] },
    Sent { command: "qom-list", arguments: &["path"], words: &[] },
    Sent {
        command: "migrate-set-capabilities",
        arguments: &["capabilities/state"],
        words: &[(
            "capabilities/capability",
            &[
                "events",
                "return-path",
                "late-block-activate",
                "pause-before-switchover",
                "validate-uuid",
                "multifd",
            ],
        )],
    },
    Sent {
        command: "migrate-set-parameters",
        arguments: &[
            "tls-creds",
            "tls-hostname",
            "tls-authz",
            "announce-rounds",
            "multifd-channels",
            "max-bandwidth",
            "downtime-limit",
        ],
        words: &[],
    },
    Sent { command: "migrate", arguments: &["uri"], words: &[] },
    Sent { command: "migrate-incoming", arguments: &["uri"], words: &[] },
    Sent { command: "migrate-continue", arguments: &[], words: &[("state", &["pre-switchover"])] },
    plain("migrate_cancel"),
];
