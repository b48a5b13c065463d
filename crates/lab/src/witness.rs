//! Talks to the witness in a guest, from the client's namespace; see [`whimbrel_guest::report`] for what it understands.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use whimbrel_guest::report::{CONTROL_PORT, Command, LINE_BYTES_MAX, Reply, Report};

use crate::error::LabError;

/// How long a connection may take to stand.
pub(crate) const CONNECT_MAX: Duration = Duration::from_secs(3);
/// How long an answer may take: a full verification of a large guest under TCG takes some seconds a GiB, and a guest may
/// be paused meanwhile.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// A connection to a guest's witness, which lives through its migrations.
#[derive(Debug)]
pub struct Witness {
    address: Ipv4Addr,
    reader: BufReader<TcpStream>,
    writer: TcpStream,
}

impl Witness {
    /// Connects from the network namespace of this thread.
    pub(crate) fn connect(address: Ipv4Addr, port: u16) -> Result<Self, LabError> {
        let failed = |source| LabError::Guest { address, source };
        let peer = SocketAddr::from((address, port));
        let stream = TcpStream::connect_timeout(&peer, CONNECT_MAX).map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        stream.set_read_timeout(Some(ANSWER_MAX)).map_err(failed)?;
        stream.set_write_timeout(Some(ANSWER_MAX)).map_err(failed)?;
        let reader = BufReader::new(stream.try_clone().map_err(failed)?);
        Ok(Self { address, reader, writer: stream })
    }

    /// Connects to a witness that is forwarded to a port of this machine: for a QEMU that was started by hand.
    ///
    /// # Errors
    /// [`LabError::Guest`].
    pub fn connect_local(port: u16) -> Result<Self, LabError> {
        Self::connect(Ipv4Addr::LOCALHOST, port)
    }

    /// Connects to the control port, from the network namespace of this thread.
    pub(crate) fn connect_guest(address: Ipv4Addr) -> Result<Self, LabError> {
        Self::connect(address, CONTROL_PORT)
    }

    /// Sends a command and returns how things stand afterwards.
    ///
    /// # Errors
    /// [`LabError::Guest`] if no answer comes, after which the connection is of no more use; [`LabError::GuestRefused`].
    pub fn command(&mut self, command: Command) -> Result<Report, LabError> {
        let address = self.address;
        match self.exchange(command).map_err(|source| LabError::Guest { address, source })? {
            Reply::Report(report) => Ok(*report),
            Reply::Refused { error } => Err(LabError::GuestRefused { why: error }),
        }
    }

    /// How things stand.
    ///
    /// # Errors
    /// As [`Witness::command`].
    pub fn status(&mut self) -> Result<Report, LabError> {
        self.command(Command::Status)
    }

    /// Verifies all memory and the whole journal now.
    ///
    /// # Errors
    /// As [`Witness::command`].
    pub fn verify(&mut self) -> Result<Report, LabError> {
        self.command(Command::Verify)
    }

    /// Sends a command that ends the guest, which therefore is not answered.
    ///
    /// # Errors
    /// [`LabError::Guest`] if it could not be sent.
    pub fn end(mut self, command: Command) -> Result<(), LabError> {
        let address = self.address;
        self.send(command).map_err(|source| LabError::Guest { address, source })
    }

    fn send(&mut self, command: Command) -> io::Result<()> {
        let mut line = serde_json::to_vec(&command)?;
        line.push(b'\n');
        self.writer.write_all(&line)
    }

    fn exchange(&mut self, command: Command) -> io::Result<Reply> {
        self.send(command)?;
        let mut line = String::new();
        self.reader.by_ref().take(LINE_BYTES_MAX as u64).read_line(&mut line)?;
        if !line.ends_with('\n') {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(serde_json::from_str(&line)?)
    }
}
