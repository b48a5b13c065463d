//! Tests of who is who in a pool, over loopback and in folders of their own.

#[cfg(test)]
mod certificates;
#[cfg(test)]
mod doors;
#[cfg(test)]
mod folders;
#[cfg(test)]
mod grants;
#[cfg(test)]
mod handshakes;
#[cfg(test)]
mod pool;
#[cfg(test)]
mod tokens;
