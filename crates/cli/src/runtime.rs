//! The runtimes: commands run on this thread alone, agent and controller on two worker threads, which is plenty for what
//! they carry and keeps them small.

use std::env;
use std::future::Future;
use std::os::unix::process::CommandExt;
use std::process::Command;

use tokio::runtime::{Builder, Runtime};

use crate::failure::Failure;

const SERVER_WORKER_THREADS: usize = 2;
/// Heaps that glibc may make, and the variable that tells it. By itself it makes one for each thread, up to eight for each
/// processor, and gives nothing back of what a burst of work took: an agent with 10 VMs and 20 migrations behind it had 32 MiB,
/// with two heaps 28.
const HEAPS: (&str, &str) = ("MALLOC_ARENA_MAX", "2");

/// Runs a command to its end.
pub(crate) fn block_on<T>(command: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    finish(Builder::new_current_thread().enable_all().build(), command)
}

/// Runs a server until it ends.
pub(crate) fn serve<T>(server: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    begin_anew_with_few_heaps();
    let mut builder = Builder::new_multi_thread();
    finish(builder.worker_threads(SERVER_WORKER_THREADS).enable_all().build(), server)
}

/// Becomes the same command once more, as the same process, with [`HEAPS`] in its environment: glibc reads that only at the
/// start. Whoever has set it has decided; where it cannot be done all is as it was, and a little larger.
fn begin_anew_with_few_heaps() {
    let (name, count) = HEAPS;
    if env::var_os(name).is_some() {
        return;
    }
    if let Ok(program) = env::current_exe() {
        let _not_done = Command::new(program).args(env::args_os().skip(1)).env(name, count).exec();
    }
}

fn finish<T>(
    runtime: std::io::Result<Runtime>,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let runtime = runtime.map_err(|error| Failure::because("cannot start the runtime", &error))?;
    let result = runtime.block_on(work);
    // A read of standard input cannot be cancelled: waiting for it would keep a finished command from ending.
    runtime.shutdown_background();
    result
}
