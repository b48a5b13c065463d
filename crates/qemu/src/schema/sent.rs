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

/// Everything that is sent to every QEMU. What is sent only where the schema has it stands in
/// [`SENT_WHERE_KNOWN`].
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
    plain("query-kvm"),
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
                "auto-converge",
                "xbzrle",
                "zero-copy-send",
                "postcopy-ram",
                "postcopy-preempt",
                "postcopy-blocktime",
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
            "multifd-zlib-level",
            "multifd-zstd-level",
            "xbzrle-cache-size",
            "cpu-throttle-initial",
            "cpu-throttle-increment",
            "max-cpu-throttle",
            "max-bandwidth",
            "max-postcopy-bandwidth",
            "downtime-limit",
        ],
        words: &[("multifd-compression", &["none", "zlib", "zstd"])],
    },
    Sent { command: "migrate", arguments: &["uri", "resume"], words: &[] },
    Sent { command: "migrate-incoming", arguments: &["uri"], words: &[] },
    Sent { command: "migrate-continue", arguments: &[], words: &[("state", &["pre-switchover"])] },
    plain("migrate_cancel"),
    plain("migrate-start-postcopy"),
    plain("x-query-ramblock"),
    plain("migrate-pause"),
    Sent { command: "migrate-recover", arguments: &["uri"], words: &[] },
    Sent { command: "getfd", arguments: &["fdname"], words: &[] },
    plain("add-fd"),
    Sent { command: "remove-fd", arguments: &["fdset-id"], words: &[] },
    Sent {
        command: "calc-dirty-rate",
        arguments: &["calc-time", "sample-pages"],
        words: &[("mode", &["page-sampling", "dirty-bitmap", "dirty-ring"])],
    },
    plain("query-dirty-rate"),
];

/// What is sent beyond that, to a QEMU whose schema has it: 10.0 has all of this, 7.2 none.
pub const SENT_WHERE_KNOWN: &[Sent] = &[
    Sent { command: "migrate-incoming", arguments: &["exit-on-error"], words: &[] },
    Sent {
        command: "migrate-set-capabilities",
        arguments: &[],
        words: &[("capabilities/capability", &["mapped-ram"])],
    },
    Sent {
        command: "migrate-set-parameters",
        arguments: &["avail-switchover-bandwidth"],
        words: &[],
    },
    Sent {
        command: "calc-dirty-rate",
        arguments: &[],
        words: &[("calc-time-unit", &["millisecond"])],
    },
    Sent {
        command: "query-dirty-rate",
        arguments: &[],
        words: &[("calc-time-unit", &["millisecond"])],
    },
    // Not sent, but looked for: with it, files can be named.
    Sent { command: "migrate", arguments: &[], words: &[("channels/addr/transport", &["file"])] },
];
