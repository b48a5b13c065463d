//! One QEMU without a migration: probed, started, adopted, driven, ended.

use std::time::Duration;

use serde_json::{Value, json};
use whimbrel_qemu::disks::jobs;
use whimbrel_qemu::engine::{self, Accelerator};
use whimbrel_qemu::event::EventKind;
use whimbrel_qemu::machine::{Machine, MachineError, RunState};
use whimbrel_qemu::process::{AdoptError, Exit, Process};
use whimbrel_qemu::qmp::QmpError;

use crate::rig::{Lab, engines, event, real_engines, soon};

#[tokio::test]
async fn an_engine_tells_what_it_can_do() {
    for engine in engines() {
        let facts = soon(engine::probe(&engine.binary, engine.user(), None)).await.unwrap();
        let (major, minor, _) = facts.version;
        assert_eq!(format!("{major}.{minor}"), engine.version);
        let newest = format!("pc-q35-{}", engine.version);
        assert_eq!(facts.pinned_machine_type("q35"), Some(newest.as_str()));
        assert_eq!(facts.pinned_machine_type("pc-q35-7.2"), Some("pc-q35-7.2"));
        let nehalem = facts.cpu_model("Nehalem").unwrap();
        assert!(nehalem.migration_safe && nehalem.unavailable_features.is_empty(), "{nehalem:?}");
        assert!(facts.host_cpu_features.contains("sse4.2"), "{:?}", facts.host_cpu_features);
        assert!(facts.features.multifd && facts.features.validate_uuid);
        // Only 9.1 and later can stay after a failed load.
        assert_eq!(facts.features.exit_on_error, major >= 10);
        assert_eq!(facts.features.channels, major >= 10);
        assert!(!facts.accelerator_reason.is_empty());

        let lab = Lab::new();
        let guest = lab.start(&engine, "web01", false).await;
        let (socket, identity) = (guest.spec.qmp_socket.clone(), guest.process.identity().clone());
        let asked = guest.machine.features().clone();
        let _killed_at_last = guest.let_go();
        let wait = Duration::from_secs(20);
        let machine = Machine::connect_to_engine(&socket, &identity, lab.uuid, &facts, wait).await;
        assert_eq!(*machine.unwrap().features(), asked);

        let forced = engine::probe(&engine.binary, engine.user(), Some(Accelerator::Tcg)).await;
        let forced = forced.unwrap();
        assert_eq!(forced.accelerator, Accelerator::Tcg);
        // TCG lacks what this model has.
        let skylake = forced.cpu_model("Skylake-Client").unwrap();
        assert!(skylake.unavailable_features.iter().any(|name| name == "pcid"), "{skylake:?}");
    }
}

#[tokio::test]
async fn a_guest_survives_its_agent_and_is_found_again() {
    for engine in engines() {
        let lab = Lab::new();
        let guest = lab.start(&engine, "web01", false).await;
        assert_eq!(guest.run_state().await, RunState::Prelaunch);
        guest.machine.cont().await.unwrap();
        let identity = guest.process.identity().clone();
        if engine.user().is_some() {
            let status = std::fs::read_to_string(format!("/proc/{}/status", identity.pid)).unwrap();
            let uid = status.lines().find(|line| line.starts_with("Uid:")).unwrap();
            assert_eq!(uid.split_ascii_whitespace().nth(1), Some("65534"));
            let seccomp = status.lines().find(|line| line.starts_with("Seccomp:")).unwrap();
            assert_eq!(seccomp.split_ascii_whitespace().nth(1), Some("2"), "no sandbox");
        }
        // An agent that is gone has no session, and one that is back makes another.
        let log = lab.dir.path().join("web01.log");
        let socket = guest.spec.qmp_socket.clone();
        let second = Machine::connect(&socket, Duration::from_millis(200)).await.unwrap_err();
        assert!(matches!(second, MachineError::Connect { .. }), "{second:?}");
        let wait = Duration::from_secs(20);
        let foreign = lab.start(&engine, "other", false).await;
        let foreign_identity = foreign.process.identity().clone();
        // All handles go, nothing is said to QEMU.
        let _killed_at_last = guest.let_go();

        let process = Process::adopt(&identity, &log).unwrap();
        let error =
            Machine::connect_to(&socket, &foreign_identity, lab.uuid, wait).await.unwrap_err();
        assert!(matches!(error, MachineError::ForeignProcess { .. }), "{error:?}");
        let error =
            Machine::connect_to(&socket, &identity, uuid::Uuid::nil(), wait).await.unwrap_err();
        assert!(matches!(error, MachineError::ForeignVm { .. }), "{error:?}");
        let machine = Machine::connect_to(&socket, &identity, lab.uuid, wait).await.unwrap();
        assert_eq!(machine.status().await.unwrap().run_state, RunState::Running);

        let mut events = machine.events();
        machine.stop().await.unwrap();
        let stopped = event(&mut events, &EventKind::Stop).await;
        assert_eq!(machine.status().await.unwrap().run_state, RunState::Paused);
        machine.cont().await.unwrap();
        let resumed = event(&mut events, &EventKind::Resume).await;
        assert!(resumed.since(stopped).is_some(), "{stopped:?} {resumed:?}");
        machine.system_reset().await.unwrap();
        machine.system_powerdown().await.unwrap();
        event(&mut events, &EventKind::Powerdown).await;
        // Under TCG the block is a little larger.
        assert!(machine.query_memory_bytes().await.unwrap() >= Some(64 << 20));
        assert_eq!(jobs::query(&machine).await.unwrap(), []);

        machine.quit().await.unwrap();
        soon(process.wait_exit()).await;
        let error = Process::adopt(&identity, &log).unwrap_err();
        assert!(matches!(error, AdoptError::Gone { .. }), "{error:?}");
        assert!(machine.status().await.unwrap_err().is_disconnected());
    }
}

#[tokio::test]
async fn the_reason_of_an_early_end_is_in_the_last_words() {
    for engine in engines() {
        let lab = Lab::new();
        let mut spec = lab.spec("web01", false);
        spec.machine_type = "pc-q35-99.9".to_owned();
        let process = Process::spawn(whimbrel_qemu::process::Launch {
            binary: engine.binary.clone(),
            arguments: whimbrel_qemu::command_line::arguments(&spec).unwrap(),
            user: None,
            inherited: Vec::new(),
            log: lab.dir.path().join("log"),
        })
        .unwrap();
        assert_eq!(soon(process.wait_exit()).await, Exit::Code(1));
        let words = process.last_words().join("\n");
        assert!(words.contains("unsupported machine type"), "{words}");
    }
}

#[tokio::test]
async fn qmp_in_the_raw() {
    for engine in real_engines() {
        let lab = Lab::new();
        let guest = lab.start(&engine, "web01", false).await;
        let qmp = guest.machine.qmp();
        assert!(qmp.greeting().out_of_band);

        let refused = qmp.execute("no-such-command", Value::Null).await.unwrap_err();
        assert!(
            matches!(&refused, QmpError::Refused { class, .. }
                if *class == whimbrel_qemu::qmp::RefusalClass::CommandNotFound),
            "{refused:?}"
        );
        // Taken out of band, and refused for want of a post-copy migration.
        let refused = qmp.execute_oob("migrate-pause", Value::Null).await.unwrap_err();
        assert!(refused.is_refusal(), "{refused:?}");

        let (_tail, head) = std::io::pipe().unwrap();
        let set = qmp.execute_with_descriptor("add-fd", Value::Null, head.into()).await.unwrap();
        assert!(set.get("fdset-id").is_some(), "{set}");
        let mut handing_over = tokio::task::JoinSet::new();
        for index in 0..20 {
            let (_, head) = std::io::pipe().unwrap();
            let qmp = qmp.clone();
            let name = json!({ "fdname": format!("f{index}") });
            handing_over.spawn(async move {
                qmp.execute_with_descriptor("getfd", name, head.into()).await
            });
        }
        for result in soon(handing_over.join_all()).await {
            result.unwrap();
        }
    }
}
