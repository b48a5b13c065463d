//! Standard output: plain lines, tables, and with `--json` one object a line.
//!
//! Everything passes [`harmless`] on its way: a name or a message from elsewhere cannot speak to the terminal. A reader
//! that goes away (`| head -1`) is no error. Nothing here knows what is shown.

use std::io::{self, Write as _};

use serde::Serialize;

use crate::failure::Failure;

/// Characters that turn the direction of what follows, and so make a text read as another one.
const TURNING: [char; 12] = [
    '\u{61c}', '\u{200e}', '\u{200f}', '\u{202a}', '\u{202b}', '\u{202c}', '\u{202d}', '\u{202e}',
    '\u{2066}', '\u{2067}', '\u{2068}', '\u{2069}',
];

fn is_harmful(c: char) -> bool {
    c.is_control() || TURNING.contains(&c)
}

/// The text with everything written out that a terminal would obey: `\u{1b}` and its like.
pub(crate) fn harmless(text: &str) -> String {
    if !text.contains(is_harmful) {
        return text.to_owned();
    }
    let spell = |c: char| match is_harmful(c) {
        true => c.escape_unicode().collect::<String>(),
        false => c.to_string(),
    };
    text.chars().map(spell).collect()
}

/// Writes one line. A text with several lines is several calls.
pub(crate) fn line(text: &str) -> Result<(), Failure> {
    write(&harmless(text))
}

/// Writes an object as one line of JSON.
pub(crate) fn json<T: Serialize + ?Sized>(value: &T) -> Result<(), Failure> {
    write(&json_text(value)?)
}

/// JSON that a terminal shows as it is: serde escapes only what JSON demands.
fn json_text<T: Serialize + ?Sized>(value: &T) -> Result<String, Failure> {
    let text = serde_json::to_string(value)
        .map_err(|error| Failure::failed(format!("cannot write the answer as JSON: {error}")))?;
    if !text.contains(is_harmful) {
        return Ok(text);
    }
    // Such characters stand only inside of JSON's strings, where an escape means the same.
    let spell = |c: char| match is_harmful(c) {
        true => format!("\\u{:04x}", u32::from(c)),
        false => c.to_string(),
    };
    Ok(text.chars().map(spell).collect())
}

fn write(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::failed(format!("cannot write to standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// Writes a line to standard error: progress and advice, never a result.
pub(crate) fn note(text: &str) {
    // Nobody is left to be told that standard error is gone.
    let _ = writeln!(io::stderr().lock(), "{}", harmless(text));
}

/// Rows under a head, in columns as wide as their widest cell.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with its head.
    pub(crate) fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(|cell| (*cell).to_owned()).collect()] }
    }

    /// Adds a row of as many cells as the head has.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.iter().map(|cell| harmless(cell)).collect());
    }

    /// The table's lines.
    pub(crate) fn lines(&self) -> Vec<String> {
        const GAP: &str = "  ";
        let wide = |cell: &String| cell.chars().count();
        let columns = self.rows[0].len();
        let widths: Vec<usize> = (0..columns)
            .map(|column| self.rows.iter().map(|row| wide(&row[column])).max().unwrap_or(0))
            .collect();
        let pad = |(cell, width): (&String, &usize)| format!("{cell:width$}");
        let join =
            |row: &Vec<String>| row.iter().zip(&widths).map(pad).collect::<Vec<_>>().join(GAP);
        self.rows.iter().map(|row| join(row).trim_end().to_owned()).collect()
    }

    /// Writes the table.
    pub(crate) fn print(&self) -> Result<(), Failure> {
        self.lines().iter().try_for_each(|text| line(text))
    }
}

/// Writes a list: with `json` an object a line, else a table of `cells` under `head`.
pub(crate) fn list<T: Serialize, const N: usize>(
    json_wanted: bool,
    items: &[T],
    head: [&str; N],
    cells: impl Fn(&T) -> [String; N],
) -> Result<(), Failure> {
    if json_wanted {
        return items.iter().try_for_each(json);
    }
    let mut table = Table::new(&head);
    items.iter().for_each(|item| table.row(cells(item)));
    table.print()
}

/// Writes one thing: with `json` the object, else its fields, name and value a line.
pub(crate) fn fields<T: Serialize>(
    json_wanted: bool,
    item: &T,
    fields: &[(&str, String)],
) -> Result<(), Failure> {
    if json_wanted {
        return json(item);
    }
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    fields.iter().try_for_each(|(name, value)| line(&format!("{name:width$}  {value}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_obeys_is_written_out() {
        assert_eq!(harmless("web01 läuft"), "web01 läuft");
        assert_eq!(harmless("a\u{1b}[31mb\r\n"), "a\\u{1b}[31mb\\u{d}\\u{a}");
        assert_eq!(harmless("\u{9b}2J\u{202e}"), "\\u{9b}2J\\u{202e}");
    }

    #[test]
    fn json_stays_the_same_value() {
        let value = serde_json::json!({"why": "a\u{1b}[31m\u{9b}\u{202e}\n\"b\""});
        let text = json_text(&value).unwrap();
        assert!(!text.contains(is_harmful));
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }

    #[test]
    fn tables_align() {
        let mut table = Table::new(&["NAME", "STATE"]);
        table.row(["web01".into(), "running".into()]);
        table.row(["a\u{7}".into(), "".into()]);
        assert_eq!(table.lines(), ["NAME    STATE", "web01   running", "a\\u{7}"]);
    }
}
