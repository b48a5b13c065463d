//! The lines of QMP: what is sent and how what comes back is read. No I/O.

use serde_json::{Map, Value, json};

use super::error::{QmpError, RefusalClass};
use super::{Greeting, SessionEnd};
use crate::event::{Event, Timestamp};

/// Which queue of QEMU a command goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Priority {
    InBand,
    OutOfBand,
}

/// A line from QEMU, sorted.
#[derive(Debug)]
pub(super) enum Incoming {
    Reply {
        id: u64,
        outcome: Outcome,
    },
    Event(Event),
    /// An answer without an id of ours, or an object of a kind we do not know.
    Other(Value),
}

/// How a command ended, still without its name.
#[derive(Debug)]
pub(super) enum Outcome {
    Returned(Value),
    Refused { class: RefusalClass, description: String },
}

impl Outcome {
    pub(super) fn of_command(self, command: &str) -> Result<Value, QmpError> {
        match self {
            Self::Returned(value) => Ok(value),
            Self::Refused { class, description } => {
                Err(QmpError::Refused { command: command.to_owned(), class, description })
            }
        }
    }
}

/// The line of one command, with its end.
pub(super) fn command_line(
    id: u64,
    command: &str,
    arguments: Value,
    priority: Priority,
) -> Vec<u8> {
    let mut object = Map::new();
    let verb = match priority {
        Priority::InBand => "execute",
        Priority::OutOfBand => "exec-oob",
    };
    object.insert(verb.to_owned(), json!(command));
    object.insert("id".to_owned(), json!(id));
    if !arguments.is_null() {
        object.insert("arguments".to_owned(), arguments);
    }
    let mut line = Value::Object(object).to_string().into_bytes();
    line.push(b'\n');
    line
}

/// Reads the first line of a session.
pub(super) fn greeting(line: &[u8]) -> Result<Greeting, SessionEnd> {
    let value = object(line)?;
    let greeting = value.get("QMP").ok_or(SessionEnd::NoGreeting)?;
    let number = |key: &str| {
        let pointer = format!("/version/qemu/{key}");
        let found = greeting.pointer(&pointer).and_then(Value::as_u64);
        found.and_then(|number| u32::try_from(number).ok()).unwrap_or(0)
    };
    let capabilities = greeting.get("capabilities").and_then(Value::as_array);
    Ok(Greeting {
        version: (number("major"), number("minor"), number("micro")),
        package: greeting
            .pointer("/version/package")
            .and_then(Value::as_str)
            .unwrap_or("")
            .to_owned(),
        out_of_band: capabilities.is_some_and(|list| list.iter().any(|word| word == "oob")),
        peer_pid: None,
    })
}

/// Reads any later line.
pub(super) fn incoming(line: &[u8]) -> Result<Incoming, SessionEnd> {
    let mut value = object(line)?;
    if let Some(name) = value.get("event").and_then(Value::as_str) {
        let data = value.get("data").cloned().unwrap_or(Value::Null);
        return Ok(Incoming::Event(Event::from_wire(name, data, timestamp(&value))));
    }
    let Some(id) = value.get("id").and_then(Value::as_u64) else {
        return Ok(Incoming::Other(value));
    };
    if let Some(returned) = value.get_mut("return") {
        let outcome = Outcome::Returned(returned.take());
        return Ok(Incoming::Reply { id, outcome });
    }
    let Some(error) = value.get("error") else {
        return Ok(Incoming::Other(value));
    };
    let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or("");
    let outcome = Outcome::Refused {
        class: RefusalClass::from_wire(text("class")),
        description: text("desc").to_owned(),
    };
    Ok(Incoming::Reply { id, outcome })
}

fn object(line: &[u8]) -> Result<Value, SessionEnd> {
    match serde_json::from_slice(line) {
        Ok(value @ Value::Object(_)) => Ok(value),
        Ok(_) => Err(SessionEnd::NotJson { problem: "not an object".to_owned() }),
        Err(error) => Err(SessionEnd::NotJson { problem: error.to_string() }),
    }
}

fn timestamp(value: &Value) -> Timestamp {
    let part = |key: &str| {
        let pointer = format!("/timestamp/{key}");
        value.pointer(&pointer).and_then(Value::as_i64).unwrap_or(0)
    };
    Timestamp { seconds: part("seconds"), microseconds: part("microseconds") }
}
