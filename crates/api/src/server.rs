//! The server side of the contract, for axum: how a body and a path are read, and how an error is answered.
//!
//! axum's own rejections are plain text; these answer with [`ApiError`], so that a client always gets a code, and with the
//! field's name where one is wrong. Used by the agent's and the controller's `http` modules.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;

use crate::{ApiError, BODY_LIMIT_BYTES, ErrorCode};

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self)).into_response()
    }
}

/// A JSON body. An empty body reads as `{}`, so that a call whose fields all have defaults can be made without one.
#[derive(Debug)]
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| {
            let code = match rejection.status() {
                StatusCode::PAYLOAD_TOO_LARGE => ErrorCode::TooLarge,
                _ => ErrorCode::BadRequest,
            };
            ApiError::new(
                code,
                format!("the body could not be read (limit {BODY_LIMIT_BYTES} bytes): {rejection}"),
            )
        })?;
        let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
        read(text).map(Body).map_err(|why| {
            let message = format!("the body is not what this call takes: {why}");
            ApiError::new(ErrorCode::BadRequest, message)
        })
    }
}

/// Reads JSON. An error names the field that it is in, by its path.
fn read<T: DeserializeOwned>(text: &[u8]) -> Result<T, String> {
    let mut json = serde_json::Deserializer::from_slice(text);
    let read = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        match error.path().iter().next() {
            Some(_) => format!("{}: {}", error.path(), error.inner()),
            None => error.inner().to_string(),
        }
    })?;
    json.end().map_err(|error| error.to_string())?;
    Ok(read)
}

/// A part of the path, such as a name or an id.
#[derive(Debug)]
pub struct Segment<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Segment<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let read = Path::<T>::from_request_parts(parts, state).await;
        read.map(|Path(value)| Segment(value))
            .map_err(|rejection| ApiError::new(ErrorCode::BadName, rejection.body_text()))
    }
}

/// The query part of the address.
#[derive(Debug)]
pub struct Params<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Params<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let read = Query::<T>::from_request_parts(parts, state).await;
        read.map(|Query(value)| Params(value))
            .map_err(|rejection| ApiError::new(ErrorCode::BadRequest, rejection.body_text()))
    }
}

/// Answers a path that does not exist.
pub async fn no_such_path() -> ApiError {
    ApiError::new(ErrorCode::NotFound, "there is no such call in this version of the API")
}
