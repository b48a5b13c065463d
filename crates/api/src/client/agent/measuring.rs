//! The calls of a host's measurements.

use std::time::Duration;

use reqwest::Method;
use whimbrel_migration::names::VmId;

use super::AgentClient;
use crate::ApiError;
use crate::measure::{
    CensusReport, CensusRequest, CpuReport, DirtyCurveReport, DirtyCurveRequest, DirtyRateReport,
    DirtyRateRequest, LinkAddress, LinkListen, LinkReport, LinkRequest,
};

/// How much longer than what is measured an answer may take, in seconds.
const BEYOND_SECONDS: u64 = 20;

impl AgentClient {
    /// Lets QEMU measure how fast a guest writes, and waits for the end: `period_ms` or a little more.
    pub async fn dirty_rate(
        &self,
        id: VmId,
        request: &DirtyRateRequest,
    ) -> Result<DirtyRateReport, ApiError> {
        let path = format!("/vms/{id}/dirty-rate");
        self.0.call(Method::POST, &path, Some(request), beyond(request.period_ms)).await
    }

    /// QEMU's last measuring of how fast a guest writes, or the one that goes on.
    pub async fn last_dirty_rate(&self, id: VmId) -> Result<DirtyRateReport, ApiError> {
        self.0.get(&format!("/vms/{id}/dirty-rate")).await
    }

    /// How many different pages a guest writes in windows of different length; takes as long as the longest.
    pub async fn dirty_curve(
        &self,
        id: VmId,
        request: &DirtyCurveRequest,
    ) -> Result<DirtyCurveReport, ApiError> {
        let path = format!("/vms/{id}/dirty-curve");
        let longest = request.windows_ms.iter().max().copied().unwrap_or(0);
        self.0.call(Method::POST, &path, Some(request), beyond(longest)).await
    }

    /// What is in a guest's memory.
    pub async fn census(
        &self,
        id: VmId,
        request: &CensusRequest,
    ) -> Result<CensusReport, ApiError> {
        self.0.post(&format!("/vms/{id}/census"), request).await
    }

    /// What the host's processors have to spare; takes a quarter of a second.
    pub async fn cpu(&self) -> Result<CpuReport, ApiError> {
        self.0.get("/cpu").await
    }

    /// How fast the way from this host to another one is; takes a quarter of a second, or nothing where a fresh result is
    /// at hand.
    pub async fn link(&self, request: &LinkRequest) -> Result<LinkReport, ApiError> {
        self.0.post("/link", request).await
    }

    /// Has a probe received: for the source's agent.
    pub async fn link_listen(&self, request: &LinkListen) -> Result<LinkAddress, ApiError> {
        self.0.post("/link/listen", request).await
    }
}

fn beyond(ms: u64) -> Option<Duration> {
    Some(Duration::from_millis(ms) + Duration::from_secs(BEYOND_SECONDS))
}
