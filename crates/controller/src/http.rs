//! The public API over HTTP: from requests to this crate's functions and back. No decision is taken here.
//!
//! | who | may |
//! |---|---|
//! | an operator | everything |
//! | nobody known, with a join token | `POST /v1/join` |
//! | an agent, the controller | nothing |
//!
//! Whatever changes something runs to its end even if the client goes away in the middle ([`to_the_end`]): a half-done call would
//! leave hosts that differ. The router is served by [`whimbrel_pki::door`], which says who calls; its OpenAPI document is checked
//! in and compared by a test ([`mod@document`]).

mod console;
mod document;
mod events;
mod migrations;
mod plans;
mod policies;
mod pool;
mod vms;

use std::future::Future;
use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::header;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;
use whimbrel_api::server::no_such_path;
use whimbrel_api::{ApiError, BODY_LIMIT_BYTES, ErrorCode};
use whimbrel_pki::door::PeerExtension;
use whimbrel_pki::identity::Peer;

use crate::Controller;

pub use document::document;

/// The document as it is checked in; a test keeps it equal to [`document()`].
const DOCUMENT_TEXT: &str = include_str!("../../../openapi/whimbrel.json");

type Shared = Arc<Controller>;

/// All calls, ready to be put behind the door.
pub fn router(controller: Arc<Controller>) -> Router {
    let (router, _) = calls().split_for_parts();
    router
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
        .merge(migrations::calls())
        .merge(plans::calls())
        .merge(policies::calls())
        .merge(events::calls())
        .route_layer(middleware::from_fn(operators_only));
    let anybody = OpenApiRouter::default().routes(routes!(pool::join));
    OpenApiRouter::with_openapi(document::frame()).nest("/v1", operators.merge(anybody))
}

/// The OpenAPI document of this API.
#[utoipa::path(get, path = "/openapi.json", tag = "pool", responses((status = 200, description = "An OpenAPI 3.1 document", body = serde_json::Value)))]
async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT_TEXT).into_response()
}

async fn operators_only(request: Request, next: Next) -> Result<Response, ApiError> {
    let caller =
        request.extensions().get::<PeerExtension>().and_then(|caller| caller.peer.as_ref());
    let who = match caller {
        Some(Peer::Operator(_)) => return Ok(next.run(request).await),
        Some(other) => other.to_string(),
        None => "a client without a certificate".to_owned(),
    };
    Err(ApiError::new(ErrorCode::NotAllowed, format!("{who} may not use the pool's API"))
        .hint("use an operator's certificate: `client.toml`, made by `whimbrel pool init`"))
}

/// Runs a call to its end, whether or not the client is still there to hear the answer.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    let ended = tokio::spawn(work).await;
    ended.unwrap_or_else(|panicked| Err(ApiError::internal("the call ended abnormally", &panicked)))
}
