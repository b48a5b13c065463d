//! The public API over HTTP: from requests to this crate's functions and back. No decision is taken here.
//!
//! | who | may |
//! |---|---|
//! | an operator | everything |
//! | a monitor | `GET /metrics` |
//! | nobody known, with a join token | `POST /v1/join` |
//! | an agent, the controller | nothing |
//!
//! Whatever changes something runs to its end even if the client goes away in the middle ([`to_the_end`]): a half-done call would
//! leave hosts that differ. The router is served by [`whimbrel_pki::door`], which says who calls; its OpenAPI document is checked
//! in and compared by a test ([`mod@document`]).

mod console;
mod document;
mod events;
mod lineage;
mod migrations;
mod plans;
mod policies;
mod pool;
mod vms;

use std::future::Future;
use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::header;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use whimbrel_api::metrics::Scrape;
use whimbrel_api::server::no_such_path;
use whimbrel_api::{ApiError, BODY_LIMIT_BYTES, ErrorCode};
use whimbrel_pki::door::PeerExtension;
use whimbrel_pki::identity::Peer;

use crate::{Controller, metrics as figures};

pub use document::document;

/// The document as it is checked in; a test keeps it equal to [`document()`].
const DOCUMENT_TEXT: &str = include_str!("../../../openapi/whimbrel.json");

/// How much of an unknown field's name is told, in characters.
const QUERY_SHOWN_CHARS: usize = 64;

type Shared = Arc<Controller>;

/// All calls, ready to be put behind the door.
pub fn router(controller: Arc<Controller>) -> Router {
    let (router, _) = calls().split_for_parts();
    let metrics = Router::new()
        .route("/metrics", get(metrics))
        .route_layer(middleware::from_fn(monitors_and_operators));
    router
        .merge(metrics)
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_path)
        .layer(DefaultBodyLimit::max(BODY_LIMIT_BYTES))
        .with_state(controller)
}

/// The calls with their descriptions.
fn calls() -> OpenApiRouter<Shared> {
    let operators = OpenApiRouter::default()
        .routes(routes!(openapi))
        .merge(pool::calls())
        .merge(vms::calls())
        .merge(lineage::calls())
        .merge(migrations::calls())
        .merge(plans::calls())
        .merge(policies::calls())
        .merge(events::calls())
        .route_layer(middleware::from_fn(no_query))
        .route_layer(middleware::from_fn(operators_only));
    let anybody = OpenApiRouter::default()
        .routes(routes!(pool::join))
        .route_layer(middleware::from_fn(no_query));
    OpenApiRouter::with_openapi(document::frame()).nest("/v1", operators.merge(anybody))
}

/// The OpenAPI document of this API.
#[utoipa::path(get, path = "/openapi.json", tag = "pool", responses((status = 200, description = "An OpenAPI 3.1 document", body = serde_json::Value)))]
async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT_TEXT).into_response()
}

/// The metrics, for Prometheus: no call of the API, whose document does not have it.
async fn metrics(State(controller): State<Shared>) -> Result<Scrape, ApiError> {
    figures::scrape(&controller).await
}

/// No call takes anything in the query of its address, and what is not known is refused by its name, as in a body.
async fn no_query(request: Request, next: Next) -> Result<Response, ApiError> {
    let fields = request.uri().query().unwrap_or_default().split('&');
    let mut names = fields.filter_map(|field| field.split('=').next());
    let Some(name) = names.find(|name| !name.is_empty()) else {
        return Ok(next.run(request).await);
    };
    let shown: String = name.chars().take(QUERY_SHOWN_CHARS).collect();
    let message = format!("`{shown}` is not known: this call takes nothing in its query");
    Err(ApiError::new(ErrorCode::BadRequest, message))
}

async fn operators_only(request: Request, next: Next) -> Result<Response, ApiError> {
    match caller(&request) {
        Some(Peer::Operator(_)) => Ok(next.run(request).await),
        other => Err(refusal(other, "may not use the pool's API")
            .hint("use an operator's certificate: `client.toml`, made by `whimbrel pool init`")),
    }
}

async fn monitors_and_operators(request: Request, next: Next) -> Result<Response, ApiError> {
    match caller(&request) {
        Some(Peer::Monitor(_) | Peer::Operator(_)) => Ok(next.run(request).await),
        other => Err(refusal(other, "may not read the metrics")
            .hint("use a monitor's certificate, made by `whimbrel pool monitor`")),
    }
}

fn caller(request: &Request) -> Option<&Peer> {
    request.extensions().get::<PeerExtension>().and_then(|caller| caller.peer.as_ref())
}

fn refusal(who: Option<&Peer>, what: &str) -> ApiError {
    let who = who.map_or_else(|| "a client without a certificate".to_owned(), Peer::to_string);
    ApiError::new(ErrorCode::NotAllowed, format!("{who} {what}"))
}

/// Runs a call to its end, whether or not the client is still there to hear the answer.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    let ended = tokio::spawn(work).await;
    ended.unwrap_or_else(|panicked| Err(ApiError::internal("the call ended abnormally", &panicked)))
}
