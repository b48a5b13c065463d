//! The runtimes: commands run on this thread alone, agent and controller on two worker threads, which is plenty for what
//! they carry and keeps them small.

use std::future::Future;

use tokio::runtime::{Builder, Runtime};

use crate::failure::Failure;

const SERVER_WORKER_THREADS: usize = 2;

/// Runs a command to its end.
pub(crate) fn block_on<T>(command: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    finish(Builder::new_current_thread().enable_all().build(), command)
}

/// Runs a server until it ends.
pub(crate) fn serve<T>(server: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let mut builder = Builder::new_multi_thread();
    finish(builder.worker_threads(SERVER_WORKER_THREADS).enable_all().build(), server)
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
