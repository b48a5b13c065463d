//! Ctrl-C while a migration is followed: counted, and answered with a question where there is somebody to answer.
//!
//! What a press means is decided in [`Wish`], which knows no terminal.

use std::io::IsTerminal as _;

use tokio::io::{AsyncBufReadExt as _, BufReader, Lines, Stdin};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::Failure;

/// Ctrl-C, counted.
pub(crate) struct Interrupts {
    signal: Signal,
    /// What else means "end", for who has something to take down.
    ends: Option<(Signal, Signal)>,
    presses: u32,
    /// Whether a cancel came of one.
    cancelled: bool,
}

impl Interrupts {
    /// From now on Ctrl-C is counted and does not end the process.
    pub(crate) fn catch() -> Result<Self, Failure> {
        let signal = caught(SignalKind::interrupt())?;
        Ok(Self { signal, ends: None, presses: 0, cancelled: false })
    }

    /// The same, and a request to terminate or a closed terminal count as Ctrl-C.
    pub(crate) fn catch_all() -> Result<Self, Failure> {
        let ends = (caught(SignalKind::terminate())?, caught(SignalKind::hangup())?);
        Ok(Self { ends: Some(ends), ..Self::catch()? })
    }

    /// Waits for the next one; says which it is.
    pub(crate) async fn next(&mut self) -> u32 {
        match &mut self.ends {
            None => self.signal.recv().await,
            Some((terminate, hangup)) => tokio::select! {
                got = self.signal.recv() => got,
                got = terminate.recv() => got,
                got = hangup.recv() => got,
            },
        };
        self.presses += 1;
        self.presses
    }

    /// Whether there has been one.
    pub(crate) fn any(&self) -> bool {
        self.presses > 0
    }

    /// Notes that the migration was cancelled because of one.
    pub(super) fn note_cancel(&mut self) {
        self.cancelled = true;
    }

    /// Whether the migration was cancelled because of one.
    pub(crate) fn cancelled(&self) -> bool {
        self.cancelled
    }
}

fn caught(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind).map_err(|error| Failure::because("cannot catch Ctrl-C", &error))
}

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Go on following.
    Follow,
    /// Ask whether to cancel.
    Ask,
    /// Cancel, and wait for the end.
    Cancel,
    /// Leave; the migration goes on.
    Leave,
}

/// What the user has wanted so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// Nothing, and there is a terminal to ask at or not.
    None { can_ask: bool },
    /// Asked whether to cancel.
    Asked,
    /// A cancel.
    Cancelled,
}

impl Wish {
    /// Ctrl-C: asks once where it can, then cancels, then leaves.
    pub(super) fn interrupted(&mut self) -> Next {
        let (wish, next) = match self {
            Self::None { can_ask: true } => (Self::Asked, Next::Ask),
            Self::None { can_ask: false } | Self::Asked => (Self::Cancelled, Next::Cancel),
            Self::Cancelled => (Self::Cancelled, Next::Leave),
        };
        *self = wish;
        next
    }

    /// A line of the user's. Unasked it says nothing.
    pub(super) fn answered(&mut self, answer: &str) -> Next {
        if *self != Self::Asked {
            return Next::Follow;
        }
        let (wish, next) = match answer.trim().to_ascii_lowercase().as_str() {
            "y" | "yes" => (Self::Cancelled, Next::Cancel),
            "d" | "detach" => (Self::Cancelled, Next::Leave),
            _ => (Self::None { can_ask: true }, Next::Follow),
        };
        *self = wish;
        next
    }
}

/// Whether there is somebody to ask: both what is asked and what is answered go through a terminal.
pub(super) fn can_ask(json: bool) -> bool {
    !json && std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// The user's answers. Nothing is read before something was asked.
pub(super) struct Answers(Option<Lines<BufReader<Stdin>>>);

impl Answers {
    /// None yet.
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// From now on they are read.
    pub(super) fn read(&mut self) {
        if self.0.is_none() {
            self.0 = Some(BufReader::new(tokio::io::stdin()).lines());
        }
    }

    /// The next one; never, before something was asked and after the terminal is gone.
    pub(super) async fn next(&mut self) -> String {
        if let Some(lines) = &mut self.0 {
            if let Ok(Some(line)) = lines.next_line().await {
                return line;
            }
            self.0 = None;
        }
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_asked_once_then_cancelled_then_left() {
        let mut wish = Wish::None { can_ask: true };
        let pressed = [wish.interrupted(), wish.interrupted(), wish.interrupted()];
        assert_eq!(pressed, [Next::Ask, Next::Cancel, Next::Leave]);
        let mut wish = Wish::None { can_ask: false };
        assert_eq!([wish.interrupted(), wish.interrupted()], [Next::Cancel, Next::Leave]);
    }

    #[test]
    fn an_answer_counts_where_something_was_asked() {
        let asked = |answer: &str| {
            let mut wish = Wish::None { can_ask: true };
            wish.interrupted();
            (wish.answered(answer), wish)
        };
        assert_eq!(asked(" Y "), (Next::Cancel, Wish::Cancelled));
        assert_eq!(asked("d"), (Next::Leave, Wish::Cancelled));
        for no in ["", "n", "no", "what?"] {
            assert_eq!(asked(no), (Next::Follow, Wish::None { can_ask: true }), "{no}");
        }
        let mut wish = Wish::None { can_ask: true };
        assert_eq!(wish.answered("y"), Next::Follow);
        assert_eq!(wish, Wish::None { can_ask: true });
    }
}
