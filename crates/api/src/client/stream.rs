//! Server-sent events, read: one JSON value per event.
//!
//! Only what our own servers send is understood: `data:` lines and an empty line after each event; comment lines (the
//! keep-alive) are passed over.

use std::marker::PhantomData;
use std::time::Duration;

use reqwest::Method;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::Caller;
use crate::{ApiError, BODY_LIMIT_BYTES, ErrorCode};

/// How long a server may be silent, in seconds: it sends a sign of life every 5 seconds.
const SILENCE_SECONDS: u64 = 15;

/// How long a server may take to begin, in seconds, a connection included: without this bound, a host that is cut off while a
/// connection to it is kept would be waited for as long as TCP tries.
const OPEN_SECONDS: u64 = 10;

/// A stream of values; [`EventStream::next`] gives one after the other.
#[derive(Debug)]
pub struct EventStream<T> {
    caller: Caller,
    response: reqwest::Response,
    buffer: Vec<u8>,
    kind: PhantomData<fn() -> T>,
}

impl<T: DeserializeOwned> EventStream<T> {
    pub(super) async fn open(caller: &Caller, path: &str) -> Result<Self, ApiError> {
        // A watch lasts as long as the migration: the answer's deadline does not apply, the server's keep-alive does.
        let request = caller.http.request(Method::GET, format!("{}{path}", caller.base));
        let request = request.timeout(Duration::from_secs(u64::from(u32::MAX)));
        let response = timeout(Duration::from_secs(OPEN_SECONDS), request.send()).await;
        let response = response.map_err(|_| caller.silent())?;
        let response = response.map_err(|error| caller.unreachable(&error))?;
        let status = response.status();
        if !status.is_success() {
            let bytes = caller.bounded_body(response).await?;
            return Err(serde_json::from_slice(&bytes).unwrap_or_else(|_| {
                ApiError::new(
                    ErrorCode::Internal,
                    format!("{} answered {path} with HTTP {status}", caller.who()),
                )
            }));
        }
        Ok(Self { caller: caller.clone(), response, buffer: Vec::new(), kind: PhantomData })
    }

    /// The next value; `None` when the server has ended the stream.
    pub async fn next(&mut self) -> Result<Option<T>, ApiError> {
        loop {
            while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if let Some(data) = line.strip_prefix(b"data:") {
                    let value = serde_json::from_slice(data.trim_ascii());
                    return value
                        .map(Some)
                        .map_err(|error| ApiError::internal("an event has another form", &error));
                }
            }
            if self.buffer.len() > BODY_LIMIT_BYTES {
                return Err(ApiError::new(
                    ErrorCode::TooLarge,
                    "an event is larger than the limit",
                ));
            }
            let chunk = timeout(Duration::from_secs(SILENCE_SECONDS), self.response.chunk()).await;
            let chunk = chunk.map_err(|_| self.caller.silent())?;
            match chunk.map_err(|error| self.caller.unreachable(&error))? {
                Some(chunk) => self.buffer.extend_from_slice(&chunk),
                None => return Ok(None),
            }
        }
    }
}
