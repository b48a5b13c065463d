//! How a lab stands: for `whimbrel lab status`, as JSON and as lines for people.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::LabError;
use crate::lab::{Lab, read_record};
use crate::plan::{CONTROLLER, CONTROLLER_ADDRESS, Folder};

/// Whether there is a lab in a folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Status {
    /// There is none.
    Down {
        /// The folder.
        dir: PathBuf,
    },
    /// A `lab up` is at work, or was killed: the next `up` or `down` removes what there is.
    Incomplete {
        /// The folder.
        dir: PathBuf,
    },
    /// There is one.
    Up {
        /// The folder.
        dir: PathBuf,
        /// The rate of the hosts' management and migration links, as in `1gbit`; none is unshaped.
        link: Option<String>,
        /// The controller.
        controller: ControllerStatus,
        /// The hosts.
        hosts: Vec<HostStatus>,
    },
}

/// The controller of a lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ControllerStatus {
    /// Its address in the management network.
    pub address: Ipv4Addr,
    /// Its process, if it runs.
    pub pid: Option<i32>,
}

/// A host of a lab.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostStatus {
    /// Its name.
    pub name: String,
    /// Its address in the management network.
    pub address: Ipv4Addr,
    /// Its QEMU.
    pub engine: PathBuf,
    /// Its agent's process, if it runs.
    pub agent_pid: Option<i32>,
    /// QEMUs that run on it.
    pub qemu_pids: Vec<i32>,
}

impl Status {
    /// Looks at a folder.
    ///
    /// # Errors
    /// [`LabError::NotRoot`], or an unreadable record.
    pub fn of(dir: &Path) -> Result<Self, LabError> {
        let dir = dir.to_owned();
        match read_record(&Folder(dir.clone()))? {
            None => Ok(Self::Down { dir }),
            Some(plan) if !plan.complete => Ok(Self::Incomplete { dir }),
            Some(_) => Self::of_lab(&Lab::open(&dir)?),
        }
    }

    fn of_lab(lab: &Lab) -> Result<Self, LabError> {
        let pid = |name: &str| lab.daemon(name).map(|process| process.pid);
        let mut hosts = Vec::new();
        for host in lab.hosts() {
            hosts.push(HostStatus {
                name: host.name.clone(),
                address: host.address,
                engine: host.engine.clone(),
                agent_pid: pid(&host.name),
                qemu_pids: lab.qemus(&host.name)?.iter().map(|process| process.pid).collect(),
            });
        }
        let controller = ControllerStatus { address: CONTROLLER_ADDRESS, pid: pid(CONTROLLER) };
        let link = lab.link().map(|rate| rate.to_string());
        Ok(Self::Up { dir: lab.dir().to_owned(), link, controller, hosts })
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let process =
            |pid: Option<i32>| pid.map_or("not running".to_owned(), |pid| format!("process {pid}"));
        match self {
            Self::Down { dir } => write!(f, "no lab in {}", dir.display()),
            Self::Incomplete { dir } => {
                write!(f, "an unfinished lab in {}; `whimbrel lab down` removes it", dir.display())
            }
            Self::Up { dir, link, controller, hosts } => {
                let link = link.as_deref().unwrap_or("unshaped");
                writeln!(f, "lab in {}, links {link}", dir.display())?;
                write!(f, "controller  {}  {}", controller.address, process(controller.pid))?;
                for host in hosts {
                    let (agent, vms) = (process(host.agent_pid), host.qemu_pids.len());
                    write!(
                        f,
                        "\n{:10}  {}  agent {agent}, {vms} QEMUs, {}",
                        host.name,
                        host.address,
                        host.engine.display()
                    )?;
                }
                Ok(())
            }
        }
    }
}
