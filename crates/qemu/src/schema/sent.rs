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
    plain("query-block-jobs"),
    plain("query-block-exports"),
    plain("query-blockstats"),
    Sent { command: "query-named-block-nodes", arguments: &["flat"], words: &[] },
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
    Sent {
        command: "nbd-server-start",
        arguments: &[
            "addr/data/host",
            "addr/data/port",
            "tls-creds",
            "tls-authz",
            "max-connections",
        ],
        words: &[("addr/type", &["inet"])],
    },
    plain("nbd-server-stop"),
    Sent {
        command: "block-export-add",
        arguments: &["id", "node-name", "name", "writable"],
        words: &[("type", &["nbd"])],
    },
    Sent { command: "block-export-del", arguments: &["id"], words: &[("mode", &["hard"])] },
    Sent {
        command: "blockdev-add",
        arguments: &[
            "node-name",
            "read-only",
            "cache/direct",
            "cache/no-flush",
            "filename",
            "file",
            "backing",
            "server/host",
            "server/port",
            "export",
            "reconnect-delay",
            "tls-creds",
            "tls-hostname",
        ],
        words: &[
            ("driver", &["nbd", "qcow2", "raw", "file"]),
            ("discard", &["unmap"]),
            ("detect-zeroes", &["unmap"]),
            ("aio", &["threads"]),
            ("server/type", &["inet"]),
        ],
    },
    Sent {
        command: "blockdev-reopen",
        arguments: &["options"],
        words: &[("options/driver", &["nbd"])],
    },
    Sent { command: "blockdev-del", arguments: &["node-name"], words: &[] },
    Sent { command: "block_resize", arguments: &["node-name", "size"], words: &[] },
    Sent {
        command: "blockdev-mirror",
        arguments: &["job-id", "device", "target", "speed", "auto-finalize", "auto-dismiss"],
        words: &[
            ("sync", &["full", "top"]),
            ("copy-mode", &["background", "write-blocking"]),
            ("on-source-error", &["report"]),
            ("on-target-error", &["stop"]),
        ],
    },
    Sent { command: "block-job-cancel", arguments: &["device", "force"], words: &[] },
    Sent { command: "block-job-resume", arguments: &["device"], words: &[] },
    Sent { command: "block-job-set-speed", arguments: &["device", "speed"], words: &[] },
    Sent { command: "job-complete", arguments: &["id"], words: &[] },
    Sent { command: "job-dismiss", arguments: &["id"], words: &[] },
    Sent {
        command: "yank",
        arguments: &["instances/node-name"],
        words: &[("instances/type", &["block-node"])],
    },
    Sent {
        command: "block-dirty-bitmap-add",
        arguments: &["node", "name", "persistent"],
        words: &[],
    },
    Sent { command: "block-dirty-bitmap-remove", arguments: &["node", "name"], words: &[] },
    Sent {
        command: "transaction",
        arguments: &["actions/data/node", "actions/data/overlay"],
        words: &[("actions/type", &["blockdev-snapshot"])],
    },
    Sent {
        command: "block-stream",
        arguments: &["job-id", "device", "base-node", "auto-finalize", "auto-dismiss"],
        words: &[("on-error", &["report"])],
    },
    Sent {
        command: "block-commit",
        arguments: &["job-id", "device", "top-node", "base-node", "auto-finalize", "auto-dismiss"],
        words: &[("on-error", &["report"])],
    },
    Sent {
        command: "snapshot-save",
        arguments: &["job-id", "tag", "vmstate", "devices"],
        words: &[],
    },
    Sent {
        command: "snapshot-load",
        arguments: &["job-id", "tag", "vmstate", "devices"],
        words: &[],
    },
    Sent { command: "snapshot-delete", arguments: &["job-id", "tag", "devices"], words: &[] },
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
    Sent {
        command: "block-job-change",
        arguments: &["id"],
        words: &[("type", &["mirror"]), ("copy-mode", &["write-blocking"])],
    },
    // Not sent, but looked for: with it, files can be named.
    Sent { command: "migrate", arguments: &[], words: &[("channels/addr/transport", &["file"])] },
];
