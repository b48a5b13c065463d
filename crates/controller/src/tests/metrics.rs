//! The metrics through the door: who may read them, and what a move leaves in them.

use whimbrel_api::metrics::Scrape;
use whimbrel_api::migration::MigrationState;
use whimbrel_pki::authority::Authority;
use whimbrel_pki::files::{ControllerIdentity, HostIdentity, MonitorIdentity, OperatorIdentity};
use whimbrel_pki::identity::CONTROLLER_DNS_NAME;
use whimbrel_pki::tls::{self, Credentials};

use super::migrations::{follow, to, two_hosts};
use super::rig::Rig;

async fn get(rig: &Rig, credentials: &Credentials, path: &str) -> (u16, String) {
    let http = reqwest::Client::builder()
        .tls_backend_preconfigured(tls::client_config(credentials).unwrap())
        .resolve(CONTROLLER_DNS_NAME, rig.address)
        .no_proxy()
        .build()
        .unwrap();
    let url = format!("https://{CONTROLLER_DNS_NAME}:{}{path}", rig.address.port());
    let answer = http.get(url).send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

#[tokio::test]
async fn monitors_read_metrics_and_nothing_else() {
    let rig = Rig::new().await;
    let authority = Authority::load(&rig.config().dir).unwrap();
    let monitor = MonitorIdentity::issue(&authority, "prometheus").unwrap().client();
    let (status, text) = get(&rig, &monitor, "/metrics").await;
    assert_eq!(status, 200, "{text}");
    assert!(text.ends_with("# EOF\n"));
    for path in ["/v1/hosts", "/v1/openapi.json"] {
        let (status, text) = get(&rig, &monitor, path).await;
        assert!(status == 403 && text.contains("monitor prometheus"), "{path}: {status} {text}");
    }
    let operator = OperatorIdentity::issue(&authority, "ann").unwrap().client();
    assert_eq!(get(&rig, &operator, "/metrics").await.0, 200);
    let host = HostIdentity::issue(&authority, "b").unwrap().client();
    let own = ControllerIdentity::issue(&authority).unwrap().client();
    for other in [host, own] {
        assert_eq!(get(&rig, &other, "/metrics").await.0, 403);
    }
}

#[tokio::test]
async fn a_move_and_a_refusal_are_counted() {
    let (rig, _a, _b) = two_hosts().await;
    let request = to("host-b");
    rig.client.migrate(&request).await.unwrap();
    assert_eq!(follow(&rig, request.id).await.state, MigrationState::Moved);
    rig.client.migrate(&to("host-b")).await.unwrap_err();
    let scraped: Scrape = crate::metrics::scrape(&rig.controller).await.unwrap();
    let text = scraped.text();
    let value = |start: &str| -> f64 {
        let series = text.lines().filter(|line| line.starts_with(start));
        series.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    };
    assert_eq!(value("whimbrel_controller_migrations_begun_total "), 1.0, "{text}");
    assert_eq!(value("whimbrel_controller_migrations_ended_total{outcome=\"moved\""), 1.0);
    assert_eq!(value("whimbrel_controller_migrations_ended_total{outcome=\"stayed\""), 0.0);
    assert_eq!(value("whimbrel_controller_migration_seconds_count"), 1.0, "{text}");
    assert!(value("whimbrel_controller_migrations_refused_total{verdict=") >= 1.0, "{text}");
    assert_eq!(value("whimbrel_controller_hosts{contact=\"ready\"}"), 2.0);
    assert_eq!(value("whimbrel_controller_host_reachable"), 2.0);
    assert_eq!(value("whimbrel_controller_migrations_running"), 0.0);
    assert!(value("whimbrel_controller_certificate_days_left ") > 300.0);
    assert!(!text.contains(&request.id.to_string()), "no series for a single migration");
}
