//! Policies: the pool's own beside the built-in ones, what they are attached to, and which one applies.
//!
//! What a policy says is [`whimbrel_migration::policy`]'s matter. A migration keeps the name of the one under which it began:
//! as long as one is active, its policy cannot be deleted.

use whimbrel_api::event::Event;
use whimbrel_api::migration::OptionProblem;
use whimbrel_api::policy::{
    AppliedPolicy, AttachPolicy, DEFAULT_POLICY, Policy, PolicyOrigin, PolicyStatus,
};
use whimbrel_api::{ApiError, ErrorCode, Name};

use crate::Controller;
use crate::store::{Attached, POLICIES_MAX, PolicyDeleted, Subject};

/// All policies, the built-in ones first.
pub(crate) async fn list(controller: &Controller) -> Result<Vec<PolicyStatus>, ApiError> {
    let own = controller.store().policies().await?;
    let built_in = Policy::built_in().into_iter().map(|policy| status(policy, true));
    Ok(built_in.chain(own.into_iter().map(|policy| status(policy, false))).collect())
}

/// One policy.
pub(crate) async fn get(controller: &Controller, name: &Name) -> Result<PolicyStatus, ApiError> {
    if let Some(policy) = Policy::named(name.as_str()) {
        return Ok(status(policy, true));
    }
    let own = controller.store().policy(name).await?;
    own.map(|policy| status(policy, false)).ok_or_else(|| unknown(name))
}

/// Makes a policy, or changes the one of its name.
pub(crate) async fn put(
    controller: &Controller,
    name: &Name,
    policy: &Policy,
) -> Result<PolicyStatus, ApiError> {
    if policy.name != *name {
        let message = format!("the path says `{name}` and the policy `{}`", policy.name);
        return Err(ApiError::new(ErrorCode::BadRequest, message).hint("say the same name twice"));
    }
    refuse_built_in(name)?;
    sound(&policy.validate())?;
    if !controller.store().put_policy(policy).await? {
        let message = format!("a pool has at most {POLICIES_MAX} policies of its own");
        return Err(ApiError::new(ErrorCode::NoResources, message).hint("delete one first"));
    }
    let made = status(policy.clone(), false);
    controller.events().publish(Event::Policy { policy: made.clone() });
    Ok(made)
}

/// Deletes a policy that nothing uses.
pub(crate) async fn delete(controller: &Controller, name: &Name) -> Result<(), ApiError> {
    refuse_built_in(name)?;
    let store = controller.store();
    if store.policy(name).await?.is_none() {
        return Err(unknown(name));
    }
    let active = store.active_migrations().await?;
    if let Some(migration) = active.iter().find(|record| record.policy.as_ref() == Some(name)) {
        let message = format!("migration {} goes by policy `{name}`", migration.id);
        return Err(ApiError::new(ErrorCode::InUse, message).hint("wait for its end"));
    }
    match store.delete_policy(name).await? {
        PolicyDeleted::Gone => {
            controller.events().publish(Event::PolicyDeleted { name: name.clone() });
            Ok(())
        }
        PolicyDeleted::Attached { pool, vms } => {
            let what = match (pool, vms) {
                (true, 0) => "the pool".to_owned(),
                (true, vms) => format!("the pool and {vms} VMs"),
                (false, vms) => format!("{vms} VMs"),
            };
            let message = format!("policy `{name}` is attached to {what}");
            Err(ApiError::new(ErrorCode::InUse, message).hint("attach another one there first"))
        }
    }
}

/// Attaches a policy to the pool or a VM, or takes it away, and says what applies there now.
pub(crate) async fn attach(
    controller: &Controller,
    subject: Subject,
    attach: &AttachPolicy,
) -> Result<AppliedPolicy, ApiError> {
    let policy = attach.policy.as_ref();
    match (controller.store().attach_policy(subject, policy).await?, policy) {
        (Attached::NoPolicy, Some(name)) => Err(unknown(name)),
        (Attached::NoPolicy | Attached::Done, _) => {
            let applied = attached(controller, subject).await?;
            controller.events().publish(event(subject, applied.clone()));
            Ok(applied)
        }
    }
}

/// The events that tell a new reader of the policies: all of them, and what applies where.
pub(crate) async fn events(controller: &Controller) -> Result<Vec<Event>, ApiError> {
    let mut all: Vec<Event> =
        list(controller).await?.into_iter().map(|policy| Event::Policy { policy }).collect();
    all.push(event(Subject::Pool, attached(controller, Subject::Pool).await?));
    let of_vms = controller.store().policies_of_vms().await?.into_iter();
    all.extend(of_vms.map(|(vm, policy)| {
        event(Subject::Vm(vm), AppliedPolicy { policy, origin: PolicyOrigin::Vm })
    }));
    Ok(all)
}

fn event(subject: Subject, applied: AppliedPolicy) -> Event {
    let vm = match subject {
        Subject::Pool => None,
        Subject::Vm(id) => Some(id),
    };
    Event::PolicyApplied { vm, applied }
}

/// What applies where a request says nothing: to a VM, or to the pool.
pub(crate) async fn attached(
    controller: &Controller,
    subject: Subject,
) -> Result<AppliedPolicy, ApiError> {
    let store = controller.store();
    if let Subject::Vm(_) = subject
        && let Some(policy) = store.attached_policy(subject).await?
    {
        return Ok(AppliedPolicy { policy, origin: PolicyOrigin::Vm });
    }
    if let Some(policy) = store.attached_policy(Subject::Pool).await? {
        return Ok(AppliedPolicy { policy, origin: PolicyOrigin::Pool });
    }
    let policy = Policy::default().name;
    debug_assert_eq!(policy.as_str(), DEFAULT_POLICY);
    Ok(AppliedPolicy { policy, origin: PolicyOrigin::Default })
}

/// The policy for a migration: the one that was asked for, else the one that applies to the VM.
pub(crate) async fn applied(
    controller: &Controller,
    subject: Subject,
    asked: Option<&Name>,
) -> Result<(AppliedPolicy, Policy), ApiError> {
    let applied = match asked {
        Some(name) => AppliedPolicy { policy: name.clone(), origin: PolicyOrigin::Request },
        None => attached(controller, subject).await?,
    };
    let policy = get(controller, &applied.policy).await?.policy;
    Ok((applied, policy))
}

/// Nothing, or every problem in one refusal.
pub(crate) fn sound(problems: &[OptionProblem]) -> Result<(), ApiError> {
    use whimbrel_api::migration::ProblemCode;
    if problems.is_empty() {
        return Ok(());
    }
    let only_numbers = problems.iter().all(|problem| problem.code == ProblemCode::OutOfRange);
    let code = if only_numbers { ErrorCode::OutOfRange } else { ErrorCode::BadRequest };
    let sentences: Vec<&str> = problems.iter().map(|problem| problem.sentence.as_str()).collect();
    Err(ApiError::new(code, sentences.join("; ")))
}

fn refuse_built_in(name: &Name) -> Result<(), ApiError> {
    if Policy::named(name.as_str()).is_none() {
        return Ok(());
    }
    let message = format!("policy `{name}` is built in: it can be neither changed nor deleted");
    Err(ApiError::new(ErrorCode::WrongState, message).hint("make one of another name"))
}

fn unknown(name: &Name) -> ApiError {
    ApiError::not_found("policy", name).hint("`whimbrel policy list` shows all")
}

fn status(policy: Policy, built_in: bool) -> PolicyStatus {
    PolicyStatus { policy, built_in }
}
