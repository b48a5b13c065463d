//! `whimbrel plan`: what moving a VM would take, before anything starts.

use clap::Args;
use whimbrel_api::plan::{
    Candidate, DestinationPlan, MeasuredAt, Measurements, PlanRequest, VmPlan,
};
use whimbrel_api::policy::PolicyOrigin;
use whimbrel_api::vm::Bytes;
use whimbrel_api::{ErrorCode, Name};
use whimbrel_migration::forecast::Convergence;
use whimbrel_migration::preflight::{Severity, Verdict};

use crate::command::Options;
use crate::failure::{Failure, verdict_lines};
use crate::migrate::options::MoveOptions;
use crate::migrate::problems::Problems;
use crate::output::Table;
use crate::values::{self, Given};
use crate::{migration, output, words};

/// Say what moving a VM would take, before anything starts: per destination, with reasons
#[derive(Debug, Args)]
#[command(after_help = "\
For each destination: whether plain pre-copy converges, and with how much room (in percent of what the guest writes); what the way \
that would be chosen takes in time, pause and bytes; why it is this one; and what would refuse the move. It is reckoned from \
measurements that take some seconds, cost the guest nothing and are taken again only where they are old: how fast the guest writes, \
a sample of its memory, a short probe of the link, processors to spare.

The exit code is 3 if every destination would refuse.

Examples:
  whimbrel plan web01                                   every other host of the pool
  whimbrel plan web01 host-b host-c
  whimbrel plan web01 host-b --postcopy --bandwidth 1gbit
  whimbrel plan web01 --json | jq '.destinations[] | {destination, refused, strategy, forecast}'")]
pub(crate) struct Plan {
    /// The VM's name or id
    #[arg(value_parser = values::vm)]
    vm: String,
    /// The destinations; every other host of the pool without any
    #[arg(value_parser = values::name)]
    hosts: Vec<Name>,
    /// Every other host of the pool
    #[arg(long, conflicts_with = "hosts")]
    all: bool,
    /// Measure anew, also where a fresh result is at hand
    #[arg(long)]
    fresh: bool,
    /// The most that probing a link may send a second; as fast as it goes without it
    #[arg(long, value_name = "RATE", allow_negative_numbers = true, value_parser = values::given(values::rate))]
    probe_rate: Option<Given<u64>>,
    #[command(flatten)]
    options: MoveOptions,
}

impl Plan {
    pub(crate) async fn run(self, options: &Options) -> Result<(), Failure> {
        let mut problems = Problems::default();
        let probe_bytes_per_s = problems.value("--probe-rate", self.probe_rate);
        let move_options = self.options.read();
        problems.end()?;
        let request = PlanRequest {
            vm: self.vm,
            destinations: self.hosts,
            options: move_options?,
            fresh: self.fresh,
            probe_bytes_per_s,
        };
        let plan = options.pool()?.plan(&request).await?;
        match options.json {
            true => output::json(&plan)?,
            false => text(&plan).iter().try_for_each(|line| output::line(line))?,
        }
        judge(&plan, options.json)
    }
}

/// A plan where nothing could be begun is a refusal. With `--json` the plan has been printed, and says why.
fn judge(plan: &VmPlan, json: bool) -> Result<(), Failure> {
    let possible = plan.destinations.iter().any(|to| !to.refused && to.trouble.is_none());
    if possible || json || plan.destinations.is_empty() {
        return Ok(());
    }
    let message = format!("{} cannot be moved to any of these hosts", plan.vm_name);
    Err(Failure::refused(ErrorCode::PreflightRefused, message))
}

/// The table, then the reasons for each destination.
fn text(plan: &VmPlan) -> Vec<String> {
    let policy = &plan.policy;
    let origin = origin(policy.origin);
    let mut lines =
        vec![format!("{} on {}, policy {} ({origin})", plan.vm_name, plan.source, policy.policy)];
    if plan.destinations.is_empty() {
        lines.push("there is no other host in the pool".to_owned());
        return lines;
    }
    lines.push(String::new());
    let head = ["TO", "VERDICT", "PLAIN", "TOTAL", "PAUSE", "SENDS", "HELD BACK BY", "WAY"];
    let mut table = Table::new(&head);
    plan.destinations.iter().for_each(|to| table.row(row(to)));
    lines.extend(table.lines());
    plan.destinations.iter().for_each(|to| lines.extend(reasons(to)));
    lines
}

/// Where a policy comes from, in words.
pub(crate) fn origin(origin: PolicyOrigin) -> &'static str {
    match origin {
        PolicyOrigin::Request => "asked for",
        PolicyOrigin::Vm => "the VM's",
        PolicyOrigin::Pool => "the pool's",
        PolicyOrigin::Default => "the default",
    }
}

fn row(to: &DestinationPlan) -> [String; 8] {
    let plan = to.plan.as_ref();
    let forecast = plan.map(|plan| &plan.forecast);
    [
        to.destination.to_string(),
        verdict(to).to_owned(),
        words::or_dash(plan.map(|plan| migration::converges(&plan.plain))),
        words::or_dash(forecast.and_then(|f| f.total_ms).map(words::duration)),
        words::or_dash(forecast.and_then(|f| f.downtime_ms).map(words::duration)),
        words::or_dash(forecast.and_then(|f| f.wire_bytes).map(Bytes)),
        words::or_dash(forecast.map(|f| f.bottleneck.as_words())),
        words::or_dash(plan.map(|plan| &plan.strategy)),
    ]
}

/// One word for a destination.
fn verdict(to: &DestinationPlan) -> &'static str {
    match &to.plan {
        _ if to.trouble.is_some() => "unknown",
        _ if to.refused => "refused",
        Some(plan) if !plan.will_do => "doubtful",
        Some(plan) if plan.forecast.convergence == Convergence::Marginal => "close",
        _ => "good",
    }
}

/// Why, for one destination.
fn reasons(to: &DestinationPlan) -> Vec<String> {
    let mut lines = vec![String::new(), format!("{}:", to.destination)];
    let mut indented = |text: String| lines.push(format!("  {text}"));
    if let Some(trouble) = &to.trouble {
        indented(format!("nothing can be said of it: {trouble}"));
    }
    let refusing = |verdict: &&Verdict| verdict.severity == Severity::Refuse;
    let refusals = to.verdicts.iter().filter(refusing);
    let warnings = to.verdicts.iter().filter(|verdict| !refusing(verdict));
    refusals.chain(warnings).flat_map(verdict_lines).for_each(&mut indented);
    if let Some(plan) = &to.plan {
        if !plan.will_do {
            indented("the best that is allowed, and it may not be enough".to_owned());
        }
        plan.decisions.iter().for_each(|decision| indented(decision.to_string()));
        if let Some(postcopy) = &plan.forecast.postcopy {
            indented(format!(
                "post-copy: runs there after {}, with {} missing; all there {} later, with {} waits of {}",
                words::duration(postcopy.runs_after_ms),
                Bytes(postcopy.missing_bytes),
                words::duration(postcopy.lasts_ms),
                postcopy.faults,
                words::duration(postcopy.stall_us / 1e3)
            ));
        }
    }
    candidates(&to.candidates).into_iter().for_each(&mut indented);
    to.measurements.iter().flat_map(measurements).for_each(&mut indented);
    to.measured.iter().filter_map(age).for_each(&mut indented);
    lines
}

/// Every way, chosen or not.
fn candidates(ways: &[Candidate]) -> Vec<String> {
    if ways.is_empty() {
        return Vec::new();
    }
    let mut table = Table::new(&["EVERY WAY", "ALLOWED", "CONVERGES", "TOTAL", "PAUSE", "SENDS"]);
    for Candidate { strategy, forecast, allowed } in ways {
        table.row([
            strategy.to_string(),
            words::yes_no(*allowed),
            migration::converges(forecast),
            words::or_dash(forecast.total_ms.map(words::duration)),
            words::or_dash(forecast.downtime_ms.map(words::duration)),
            words::or_dash(forecast.wire_bytes.map(Bytes)),
        ]);
    }
    table.lines()
}

/// What it was reckoned from.
fn measurements(facts: &Measurements) -> Vec<String> {
    let mut lines = Vec::new();
    let census = &facts.census;
    if census.sampled_pages > 0 {
        let share = |pages: u64| 100.0 * pages as f64 / census.sampled_pages as f64;
        let best = census.compression.iter().map(|sample| sample.ratio).reduce(f64::min);
        let packed = best.map(|ratio| format!(", the rest packs to {:.0} %", ratio * 100.0));
        lines.push(format!(
            "memory: {}, {:.0} % zero, {:.0} % duplicate{}",
            Bytes(facts.memory_bytes),
            share(census.zero_pages),
            share(census.duplicate_pages),
            packed.unwrap_or_default()
        ));
    }
    let longest = facts.dirty.windows.iter().max_by_key(|window| window.window_ms);
    if let Some(window) = longest.filter(|window| window.window_ms > 0) {
        let rate = window.dirtied_bytes.saturating_mul(1_000) / window.window_ms;
        let (bytes, time) = (Bytes(window.dirtied_bytes), words::duration(window.window_ms as f64));
        lines.push(format!("guest: writes to {bytes} in {time}, {}/s", Bytes(rate)));
    }
    let link = &facts.link;
    let least = if link.at_least { "at least " } else { "" };
    lines.push(format!(
        "link: {least}{}, round trip {}",
        words::bit_rate(link.bytes_per_s.saturating_mul(8)),
        words::duration(words::ms_of_us(link.rtt_us))
    ));
    let (here, there) = (&facts.source_cpu, &facts.destination_cpu);
    lines.push(format!(
        "processors to spare: {:.1} of {} here, {:.1} of {} there",
        here.spare_cores, here.cores, there.spare_cores, there.cores
    ));
    lines
}

/// What is not of this moment.
fn age(measured: &MeasuredAt) -> Option<String> {
    let what = measured.what.as_words();
    match (&measured.trouble, measured.age_ms) {
        (Some(trouble), _) => Some(format!("not measured, assumed: {what}: {trouble}")),
        (None, Some(age_ms)) if age_ms >= 1_000 => {
            Some(format!("{what}: measured {} ago", words::duration(age_ms as f64)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests;
