//! What a fake host measures: what the test says it would, at once.

use axum::extract::State as Extract;
use axum::routing::{get, post};
use axum::{Json, Router};
use whimbrel_api::measure::{
    CalcStatus, Census, CensusReport, CensusRequest, CompressionSample, CpuReport, CpuSpare,
    DirtyCurveReport, DirtyCurveRequest, DirtyMeasure, DirtyRateReport, DirtyRateRequest,
    DirtyWindow, LinkMeasure, LinkReport, LinkRequest,
};
use whimbrel_api::migration::CompressionMethod;
use whimbrel_api::server::{Body, Segment};
use whimbrel_api::{ApiError, VmId};
use whimbrel_migration::preflight::EngineAbilities;

use super::Measures;
use super::calls::Host;

pub(super) fn calls() -> Router<Host> {
    Router::new()
        .route("/vms/{id}/dirty-rate", post(dirty_rate))
        .route("/vms/{id}/dirty-curve", post(dirty_curve))
        .route("/vms/{id}/census", post(census))
        .route("/cpu", get(cpu))
        .route("/link", post(link))
}

/// What every QEMU of a fake host can do: what 7.2 can.
pub(super) fn abilities() -> EngineAbilities {
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
    EngineAbilities {
        version: "7.2.0".parse().expect("it is a version"),
        capabilities: words(&[
            "auto-converge",
            "multifd",
            "postcopy-preempt",
            "postcopy-ram",
            "xbzrle",
            "zero-copy-send",
        ]),
        parameters: words(&[]),
        compressions: words(&["none", "zlib", "zstd"]),
        postcopy_obstacle: None,
        memory_page_bytes: 4096,
    }
}

fn measures(host: &Host, id: VmId) -> Result<(Measures, u64), ApiError> {
    host.with(|state| {
        let vm = state.vms.get(&id).ok_or_else(|| ApiError::not_found("VM", id))?;
        Ok((state.measures, vm.definition.memory_bytes))
    })
}

async fn dirty_rate(
    Extract(host): Extract<Host>,
    Segment(id): Segment<VmId>,
    Body(request): Body<DirtyRateRequest>,
) -> Result<Json<DirtyRateReport>, ApiError> {
    let (measures, _) = measures(&host, id)?;
    Ok(Json(DirtyRateReport {
        calc_status: CalcStatus::Measured,
        calc_start_time_seconds: Some(1),
        calc_period_ms: Some(request.period_ms),
        megabytes_per_second: Some(measures.dirty_bytes_per_s >> 20),
        calc_mode: Some("page-sampling".to_owned()),
        sample_pages: Some(512),
        vcpus: Vec::new(),
    }))
}

/// A guest that always writes somewhere else.
async fn dirty_curve(
    Extract(host): Extract<Host>,
    Segment(id): Segment<VmId>,
    Body(request): Body<DirtyCurveRequest>,
) -> Result<Json<DirtyCurveReport>, ApiError> {
    let (measures, memory_bytes) = measures(&host, id)?;
    let window = |window_ms: &u64| DirtyWindow {
        window_ms: *window_ms,
        dirtied_bytes: (measures.dirty_bytes_per_s * window_ms / 1_000).min(memory_bytes),
    };
    let windows = request.windows_ms.iter().map(window).collect();
    Ok(Json(DirtyCurveReport {
        measure: DirtyMeasure { windows, vcpu_busy_share: 1.0 },
        curve: Vec::new(),
        sampled_pages: u64::from(request.sample_pages),
        memory_bytes,
        cpu_ms: 1,
    }))
}

async fn census(
    Extract(host): Extract<Host>,
    Segment(id): Segment<VmId>,
    Body(request): Body<CensusRequest>,
) -> Result<Json<CensusReport>, ApiError> {
    let (measures, memory_bytes) = measures(&host, id)?;
    let census = Census {
        sampled_pages: u64::from(request.sample_pages),
        zero_pages: 0,
        duplicate_pages: 0,
        compression: vec![CompressionSample {
            method: CompressionMethod::Zstd,
            level: 1,
            ratio: measures.zstd_ratio,
            compress_ns_per_byte: 1.0,
            decompress_ns_per_byte: 0.5,
        }],
    };
    Ok(Json(CensusReport {
        census,
        zero_share_error: 0.0,
        untouched_pages: 0,
        swapped_pages: 0,
        compressed_pages: 0,
        memory_bytes,
        cpu_ms: 1,
    }))
}

async fn cpu() -> Json<CpuReport> {
    let spare = CpuSpare { spare_cores: 8.0, cores: 8 };
    Json(CpuReport { spare, window_ms: 250, boot: String::new() })
}

async fn link(Extract(host): Extract<Host>, Body(request): Body<LinkRequest>) -> Json<LinkReport> {
    let bytes_per_s = host.with(|state| state.measures.link_bytes_per_s);
    Json(LinkReport {
        measure: LinkMeasure { bytes_per_s, at_least: false, rtt_us: 200 },
        tls: request.tls,
        counted_bytes: 1,
        counted_us: 1,
        age_ms: 0,
    })
}
