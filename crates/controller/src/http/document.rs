//! The OpenAPI document: what the calls say of themselves, and for each call the errors that it can answer with.
//!
//! The codes come from [`ErrorCode::ALL`], so that a new code appears in the document by itself.

use std::collections::BTreeMap;

use utoipa::openapi::path::Operation;
use utoipa::openapi::security::{SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    ContentBuilder, Info, License, OpenApi, OpenApiBuilder, Ref, ResponseBuilder,
};
use utoipa::{PartialSchema, ToSchema};
use whimbrel_api::{ApiError, ErrorCode};

/// The version in the document: that of the interface, which changes with an incompatible change only.
const API_VERSION: &str = "1";
/// What the document calls the certificate that every call but joining wants.
const OPERATOR: &str = "operator";

/// The document's head, to which the calls are added.
pub(super) fn frame() -> OpenApi {
    let mut info = Info::new("Whimbrel", API_VERSION);
    info.description = Some(
        "The public API of a pool: its hosts, networks, storages, VMs and migrations. HTTP/1.1 and JSON over mutual TLS; \
         sizes are bytes, times say their unit in their name. Requests with unknown fields are refused. Every answer that is \
         not a success is an `ApiError`; 4xx means that nothing was begun, 503 that the outcome is unknown: ask again with the \
         same ids."
            .to_owned(),
    );
    info.license = Some(License::new("MIT OR Apache-2.0"));
    OpenApiBuilder::new().info(info).build()
}

/// The whole document.
#[must_use]
pub fn document() -> OpenApi {
    let mut document = super::calls().into_openapi();
    for item in document.paths.paths.values_mut() {
        let operations =
            [&mut item.get, &mut item.put, &mut item.post, &mut item.delete, &mut item.patch];
        operations.into_iter().flatten().for_each(add_errors);
    }
    let components = document.components.get_or_insert_default();
    components.add_security_scheme(
        OPERATOR,
        SecurityScheme::MutualTls {
            description: Some("A client certificate of the pool's authority".to_owned()),
            deprecated: None,
            extensions: None,
        },
    );
    document.security = Some(vec![operators_only()]);
    let mut schemas = vec![(ApiError::name().into_owned(), ApiError::schema())];
    ApiError::schemas(&mut schemas);
    components.schemas.extend(schemas);
    document
}

fn operators_only() -> SecurityRequirement {
    SecurityRequirement::new(OPERATOR, Vec::<String>::new())
}

/// Each status that carries an error, with its codes.
fn add_errors(operation: &mut Operation) {
    let mut by_status: BTreeMap<u16, Vec<&str>> = BTreeMap::new();
    for code in ErrorCode::ALL {
        by_status.entry(code.status()).or_default().push(code.as_str());
    }
    for (status, codes) in by_status {
        let content = ContentBuilder::new().schema(Some(Ref::from_schema_name(ApiError::name())));
        let response = ResponseBuilder::new()
            .description(format!("`code` is one of: {}", codes.join(", ")))
            .content("application/json", content.build())
            .build();
        operation.responses.responses.insert(status.to_string(), response.into());
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../openapi/whimbrel.json");

    /// `UPDATE_OPENAPI=1 cargo test -p whimbrel-controller openapi` rewrites the file.
    #[test]
    fn the_checked_in_openapi_document_is_the_real_one() {
        let text = document().to_pretty_json().unwrap() + "\n";
        if std::env::var_os("UPDATE_OPENAPI").is_some() {
            std::fs::write(Path::new(FILE), &text).unwrap();
        }
        let found = std::fs::read_to_string(FILE).unwrap();
        assert!(found == text, "openapi/whimbrel.json is out of date; run with UPDATE_OPENAPI=1");
    }

    #[test]
    fn every_reference_leads_somewhere_and_every_call_tells_its_errors() {
        let json = serde_json::to_value(document()).unwrap();
        let schemas = json["components"]["schemas"].as_object().unwrap();
        let text = json.to_string();
        for found in text.split("#/components/schemas/").skip(1) {
            let name = found.split('"').next().unwrap();
            assert!(schemas.contains_key(name), "{name}");
        }
        assert!(json["openapi"].as_str().unwrap().starts_with("3.1"));
        for (path, item) in json["paths"].as_object().unwrap() {
            assert!(path.starts_with("/v1/"));
            for (method, operation) in item.as_object().unwrap() {
                assert!(operation["responses"]["409"].is_object(), "{method} {path}");
                assert!(operation["operationId"].is_string(), "{method} {path}");
            }
        }
    }
}
