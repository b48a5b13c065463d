//! What stands for TLS between two fakes: each sends the text of its certificates, and each looks
//! at what a real handshake would look at, except the signatures.

use std::path::Path;

use serde_json::{Value, json};
use x509_parser::extensions::GeneralName;
use x509_parser::pem::parse_x509_pem;

/// What a source says of itself; null without credentials.
pub(super) fn of_client(dir: Option<&Value>, hostname: &Value) -> Value {
    let Some(dir) = dir.and_then(Value::as_str) else { return Value::Null };
    let hostname = hostname.as_str().unwrap_or_default();
    json!({
        "ca": read(dir, "ca-cert.pem"), "certificate": read(dir, "client-cert.pem"),
        "expects": hostname,
    })
}

/// What the destination says of itself to a client that it lets in.
pub(super) fn let_in(
    dir: &Value,
    identity: Option<&Value>,
    client: &Value,
) -> Result<Value, String> {
    let dir = dir.as_str().unwrap_or_default();
    let ca = read(dir, "ca-cert.pem");
    if client["ca"] != json!(ca) {
        return Err("The certificate is not trusted".to_owned());
    }
    let name = names(client["certificate"].as_str().unwrap_or_default())?.distinguished;
    if identity.and_then(Value::as_str).is_some_and(|allowed| allowed != name) {
        return Err(format!("TLS x509 authz check for {name} is denied"));
    }
    Ok(json!({ "certificate": read(dir, "server-cert.pem") }))
}

/// What a source looks at of the destination.
pub(super) fn check_server(verdict: &Value, own: &Value) -> Result<(), String> {
    let certificate = verdict.pointer("/tls/certificate").and_then(Value::as_str);
    let certificate = certificate.ok_or("Cannot write to TLS channel: Input/output error")?;
    let expected = own["expects"].as_str().unwrap_or_default();
    if names(certificate)?.hosts.iter().any(|host| host == expected) {
        Ok(())
    } else {
        Err(format!("Certificate does not match the hostname {expected}"))
    }
}

struct Names {
    distinguished: String,
    hosts: Vec<String>,
}

fn names(pem: &str) -> Result<Names, String> {
    let (_, pem) = parse_x509_pem(pem.as_bytes()).map_err(|error| error.to_string())?;
    let certificate = pem.parse_x509().map_err(|error| error.to_string())?;
    let alternative = certificate.subject_alternative_name().map_err(|error| error.to_string())?;
    let hosts = alternative.into_iter().flat_map(|found| &found.value.general_names);
    let host = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(host) => Some((*host).to_owned()),
        _ => None,
    };
    Ok(Names {
        distinguished: certificate.subject().to_string(),
        hosts: hosts.filter_map(host).collect(),
    })
}

fn read(dir: &str, file: &str) -> String {
    // Its being there was checked when the credentials were made.
    std::fs::read_to_string(Path::new(dir).join(file)).unwrap_or_default()
}
