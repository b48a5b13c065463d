//! Measurements: QEMU's own through the fake, memory through the real QEMU, the way between two agents.

use std::path::Path;

use whimbrel_api::client::AgentClient;
use whimbrel_api::measure::{
    CalcStatus, CensusRequest, DirtyCurveRequest, DirtyRateMode, DirtyRateRequest, LinkListen,
    LinkRequest,
};
use whimbrel_api::{ErrorCode, MigrationId, VmId};
use whimbrel_pki::files::HostIdentity;
use whimbrel_pki::tls;

use crate::http::{controller, serve};
use crate::place::{Place, Pool, definition, eventually, in_namespace, running};

#[test]
fn qemus_dirty_rate_is_told_by_virshs_names() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.faults("dirty-rate=123");
        place.life(async |host| {
            let id = running(&host).await.definition.id;
            let before = whimbrel_agent::measure::last_dirty_rate(&host, id).await.unwrap();
            assert_eq!(
                (before.calc_status, before.megabytes_per_second),
                (CalcStatus::Unstarted, None)
            );
            // 7.2 takes whole seconds only.
            let request = DirtyRateRequest { period_ms: 1500, ..DirtyRateRequest::default() };
            let told = whimbrel_agent::measure::dirty_rate(&host, id, &request).await.unwrap();
            assert_eq!(told.calc_status, CalcStatus::Measured);
            assert_eq!(told.megabytes_per_second, Some(123));
            assert_eq!(told.calc_period_ms, Some(2000));
            assert_eq!(told.calc_mode.as_deref(), Some("page-sampling"));
            assert_eq!(whimbrel_agent::measure::last_dirty_rate(&host, id).await.unwrap(), told);
        });
    });
}

#[test]
fn a_dirty_rate_is_refused_where_it_cannot_be_measured() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let measure = whimbrel_agent::measure::dirty_rate;
            let code = async |id: VmId, request: &DirtyRateRequest| {
                measure(&host, id, request).await.unwrap_err().code
            };
            let id = running(&host).await.definition.id;
            let usual = DirtyRateRequest::default();
            for period_ms in [0, 99, 60_001, u64::MAX] {
                let request = DirtyRateRequest { period_ms, ..usual.clone() };
                assert_eq!(code(id, &request).await, ErrorCode::OutOfRange);
            }
            let many = DirtyRateRequest { sample_pages: Some(1 << 20), ..usual.clone() };
            assert_eq!(code(id, &many).await, ErrorCode::OutOfRange);
            let (mode, sample_pages) = (DirtyRateMode::DirtyBitmap, Some(512));
            let mixed = DirtyRateRequest { mode, sample_pages, ..usual.clone() };
            assert_eq!(code(id, &mixed).await, ErrorCode::BadRequest);
            // Either would end 7.2 where it has no KVM.
            for mode in [DirtyRateMode::DirtyBitmap, DirtyRateMode::DirtyRing] {
                let marks = DirtyRateRequest { mode, ..usual.clone() };
                assert_eq!(code(id, &marks).await, ErrorCode::WrongState);
            }
            assert_eq!(code(VmId::new(), &usual).await, ErrorCode::NotFound);

            place.faults("measuring-ms=600000");
            let (at, asked) = (std::sync::Arc::clone(&host), usual.clone());
            let going_on = tokio::spawn(async move { measure(&at, id, &asked).await });
            let begun = async || {
                let last = whimbrel_agent::measure::last_dirty_rate(&host, id).await.unwrap();
                last.calc_status == CalcStatus::Measuring
            };
            eventually(begun).await;
            assert_eq!(code(id, &usual).await, ErrorCode::Busy);
            // Whoever migrates has it then, and its figure is void.
            let lent = host.vms.lend(id, MigrationId::new()).await.unwrap();
            let void = going_on.await.unwrap().unwrap_err();
            assert_eq!(void.code, ErrorCode::Migrating, "{void}");
            assert_eq!(code(id, &usual).await, ErrorCode::Migrating);
            let census = whimbrel_agent::measure::census(&host, id, CensusRequest::default()).await;
            assert_eq!(census.unwrap_err().code, ErrorCode::Migrating);
            host.vms.give_back(lent).await;
        });
    });
}

#[test]
fn a_guests_memory_is_read_without_making_any() {
    let engine = Path::new("/usr/bin/qemu-system-x86_64");
    assert!(engine.exists(), "install the package qemu-system-x86");
    in_namespace(move || {
        let place = Place::with_engine(engine);
        place.life(async |host| {
            let report = running(&host).await;
            let (id, pid) = (report.definition.id, report.engine.unwrap().pid);
            let resident = || {
                let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
                text.split(' ').nth(1).unwrap().parse::<u64>().unwrap()
            };
            // A disk without a system on it: the firmware gives up soon, and the guest stands still.
            eventually(async || {
                let before = resident();
                tokio::time::sleep(std::time::Duration::from_millis(500)).await;
                resident() == before
            })
            .await;
            let census = whimbrel_agent::measure::census;
            let told = census(&host, id, CensusRequest::default()).await.unwrap();
            assert_eq!((told.memory_bytes, told.census.sampled_pages), (64 << 20, 4096));
            assert!(told.untouched_pages > 2000 && told.census.zero_share() < 1.0, "{told:?}");
            let pages = resident();
            let wide = DirtyCurveRequest { windows_ms: vec![50, 100], sample_pages: 16_384 };
            let curve = whimbrel_agent::measure::dirty_curve(&host, id, wide).await.unwrap();
            assert_eq!(curve.sampled_pages, 16_384, "all there are");
            assert!(curve.measure.windows.iter().all(|window| window.dirtied_bytes < 1 << 20));
            assert!(resident() < pages + 256, "looking has made memory: {pages}, {}", resident());

            let few = CensusRequest { sample_pages: 1 };
            assert_eq!(census(&host, id, few).await.unwrap_err().code, ErrorCode::OutOfRange);
            for windows_ms in [vec![], vec![1], vec![500, 250], vec![100; 9]] {
                let wrong = DirtyCurveRequest { windows_ms, ..DirtyCurveRequest::default() };
                let refused = whimbrel_agent::measure::dirty_curve(&host, id, wrong).await;
                assert_eq!(refused.unwrap_err().code, ErrorCode::OutOfRange);
            }
            host.vms.act(id, whimbrel_api::vm::VmAction::Stop, true).await.unwrap();
            let stopped = census(&host, id, CensusRequest::default()).await.unwrap_err();
            assert_eq!(stopped.code, ErrorCode::WrongState);
        });
    });
}

#[test]
fn a_process_without_such_memory_is_told() {
    in_namespace(|| {
        let place = Place::with_fake();
        place.life(async |host| {
            let made = whimbrel_agent::vm::create(&host, definition()).await.unwrap();
            let id = crate::place::start(&host, made.definition.id).await.definition.id;
            let census = whimbrel_agent::measure::census(&host, id, CensusRequest::default()).await;
            let refused = census.unwrap_err();
            assert!(refused.code == ErrorCode::Engine && refused.message.contains("0 mappings"));
        });
    });
}

#[test]
fn the_way_between_two_hosts_is_measured_and_remembered() {
    in_namespace(|| {
        let pool = Pool::new();
        let (a, b) = (pool.host("a", 7440), pool.host("b", 7441));
        let there = b.live();
        serve(&a, async || {
            let agent = b.config.advertised();
            let way = LinkRequest::new("b".parse().unwrap(), agent.clone());
            let first = controller(&a).link(&way).await.unwrap();
            assert!(first.tls && first.age_ms == 0 && !first.measure.at_least, "{first:?}");
            assert!(first.measure.bytes_per_s > 1_000_000, "{first:?}");
            assert!(first.measure.rtt_us > 0 && first.counted_bytes <= 32 << 20, "{first:?}");
            let again = controller(&a).link(&way).await.unwrap();
            assert_eq!((again.measure, again.counted_us), (first.measure, first.counted_us));
            let plain = LinkRequest { tls: false, anew: true, ..way.clone() };
            assert!(!controller(&a).link(&plain).await.unwrap().tls);
            let slow = LinkRequest { max_bytes_per_s: Some(1 << 20), ..way.clone() };
            let slow = controller(&a).link(&slow).await.unwrap();
            assert!(slow.measure.bytes_per_s < 2 << 20, "{slow:?}");
            let crawl = LinkRequest { max_bytes_per_s: Some(1), ..way.clone() };
            let refused = controller(&a).link(&crawl).await.unwrap_err();
            assert_eq!(refused.code, ErrorCode::OutOfRange);

            // Somebody else's name at that address.
            let other = LinkRequest::new("c".parse().unwrap(), agent);
            let refused = controller(&a).link(&other).await.unwrap_err();
            assert_eq!(refused.code, ErrorCode::CertificateWrongName);
            let cpu = controller(&a).cpu().await.unwrap();
            assert!(cpu.spare.cores > 0 && !cpu.boot.is_empty());
            assert!(cpu.spare.spare_cores <= cpu.spare.cores as f64);
        });
        there.kill();
    });
}

#[test]
fn a_host_receives_one_probe_at_a_time_and_from_whom_it_says() {
    in_namespace(|| {
        let place = Place::with_fake();
        serve(&place, async || {
            let identity = HostIdentity::issue(&place.pool.authority, "b").unwrap();
            let tls = std::sync::Arc::new(tls::client_config(&identity.client()).unwrap());
            let name = &place.config.name;
            let b = AgentClient::new(name, &place.config.advertised(), tls).unwrap();
            let from = |name: &str| LinkListen { from: name.parse().unwrap(), tls: true };
            let foreign = b.link_listen(&from("c")).await.unwrap_err();
            assert_eq!(foreign.code, ErrorCode::NotAllowed);
            assert_eq!(b.cpu().await.unwrap_err().code, ErrorCode::NotAllowed);
            let address = b.link_listen(&from("b")).await.unwrap();
            assert!((49152..=49215).contains(&address.port) && address.ticket.len() == 43);
            let twice = b.link_listen(&from("b")).await.unwrap_err();
            assert_eq!(twice.code, ErrorCode::Busy);
            // Whoever does not come is not waited for.
            eventually(async || b.link_listen(&from("b")).await.is_ok()).await;
        });
    });
}
