//! Imitated disks: nodes, exports, mirrors, and connections over real TCP. What a mirror copies is carried over in one
//! piece when it ends, file to file; it behaves as if the guest wrote all the time, so that a lost
//! connection is noticed at once.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};

use super::mirroring::Job;
use super::vm::Vm;
use super::{mirroring, tls};

/// Requests of one connection that may wait: each mirror has one.
const REQUESTS_MAX: usize = 64;

/// What is known of the disks beyond the command line.
#[derive(Default)]
pub(super) struct Disks {
    /// Nodes added, by name.
    nodes: BTreeMap<String, Node>,
    /// Nodes of the command line that were removed.
    removed: Vec<String>,
    /// What drives use instead of what they began with.
    drives: BTreeMap<String, String>,
    pub(super) jobs: BTreeMap<String, Job>,
    server: Option<watch::Sender<()>>,
    /// The node of each export; connections end when the sender goes.
    exports: BTreeMap<String, (String, watch::Sender<()>)>,
}

/// A node that was added.
enum Node {
    Image { path: PathBuf, driver: String },
    Remote { connection: Option<Connection>, yanked: bool },
}

/// A line for the server, and who waits for its answer.
type Request = (String, oneshot::Sender<()>);

/// A client's connection to an export.
struct Connection {
    requests: mpsc::Sender<Request>,
    alive: watch::Receiver<bool>,
    size: u64,
}

type Done = Result<Value, String>;

/// The commands about disks; none for any other.
pub(super) async fn carry_out(vm: &Arc<Vm>, name: &str, arguments: &Value) -> Option<Done> {
    Some(match name {
        "query-block" => Ok(drives(vm)),
        "query-blockstats" => Ok(statistics(vm)),
        "query-named-block-nodes" => Ok(nodes(vm)),
        "query-block-exports" => Ok(exports(vm)),
        "query-jobs" => Ok(mirroring::query(vm, false)),
        "query-block-jobs" => Ok(mirroring::query(vm, true)),
        "nbd-server-start" => serve(vm, arguments).await,
        "nbd-server-stop" => stop_serving(vm),
        "block-export-add" => export(vm, arguments),
        "block-export-del" => match vm.state().disks.exports.remove(text(arguments, "id")) {
            Some(_) => Ok(json!({})),
            None => Err(format!("Export '{}' is not found", text(arguments, "id"))),
        },
        "blockdev-add" => add(vm, arguments).await,
        "blockdev-reopen" => reopen(vm, &arguments["options"][0]).await,
        "blockdev-del" => remove(vm, text(arguments, "node-name")),
        "yank" => yank(vm, text(&arguments["instances"][0], "node-name")),
        "transaction" => put_on(vm, arguments),
        "blockdev-mirror" => mirroring::begin(vm, arguments),
        "block-job-cancel"
        | "block-job-resume"
        | "block-job-set-speed"
        | "block-job-change"
        | "job-complete"
        | "job-dismiss" => mirroring::order(vm, name, arguments),
        "block_resize"
        | "block-stream"
        | "block-commit"
        | "block-dirty-bitmap-add"
        | "block-dirty-bitmap-remove"
        | "snapshot-save"
        | "snapshot-load"
        | "snapshot-delete" => Err(format!("{name} is not imitated")),
        _ => return None,
    })
}

pub(super) fn text<'a>(arguments: &'a Value, key: &str) -> &'a str {
    arguments[key].as_str().unwrap_or_default()
}

/// The file and the format of a node on this host.
pub(super) fn image(vm: &Vm, name: &str) -> Option<(PathBuf, String)> {
    let state = vm.state();
    if let Some(Node::Image { path, driver }) = state.disks.nodes.get(name) {
        return Some((path.clone(), driver.clone()));
    }
    if state.disks.removed.iter().any(|removed| removed == name) {
        return None;
    }
    let node = vm.options.block_nodes.iter().find(|node| text(node, "node-name") == name)?;
    let path = node.pointer("/file/filename").and_then(Value::as_str)?;
    Some((path.into(), text(node, "driver").to_owned()))
}

/// What a guest sees of an image: the size in qcow2's header, else the file's.
fn virtual_size(path: &Path, driver: &str) -> u64 {
    use std::os::unix::fs::FileExt;
    let Ok(file) = std::fs::File::open(path) else { return 0 };
    let mut size = [0; 8];
    if driver == "qcow2" && file.read_exact_at(&mut size, 24).is_ok() {
        return u64::from_be_bytes(size);
    }
    file.metadata().map(|found| found.len()).unwrap_or(0)
}

/// The size of any node.
pub(super) fn size(vm: &Vm, name: &str) -> Option<u64> {
    if let Some(Node::Remote { connection, .. }) = vm.state().disks.nodes.get(name) {
        return connection.as_ref().map(|connection| connection.size);
    }
    image(vm, name).map(|(path, driver)| virtual_size(&path, &driver))
}

/// Whether a node can be written: an image always, one elsewhere while it is connected.
pub(super) fn reachable(vm: &Vm, name: &str) -> bool {
    match vm.state().disks.nodes.get(name) {
        Some(Node::Remote { connection, .. }) => {
            connection.as_ref().is_some_and(|connection| *connection.alive.borrow())
        }
        _ => true,
    }
}

/// Carries what a node holds to another, in one piece, where both are of one format.
pub(super) async fn carry_over(vm: &Vm, source: &str, target: &str) -> Result<(), String> {
    let lost = || "Input/output error".to_owned();
    let (path, driver) = image(vm, source).ok_or("no such source")?;
    let remote = match vm.state().disks.nodes.get(target) {
        Some(Node::Remote { connection, .. }) => {
            let connection = connection.as_ref().ok_or_else(lost)?;
            let (answered, answer) = oneshot::channel();
            let line = json!({ "copied": path, "driver": driver }).to_string();
            connection.requests.try_send((line, answered)).map_err(|_| lost())?;
            Some(answer)
        }
        _ => None,
    };
    if let Some(answer) = remote {
        return answer.await.map_err(|_| lost());
    }
    let (onto, onto_driver) = image(vm, target).ok_or("no such target")?;
    if driver == onto_driver {
        std::fs::copy(path, onto).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Lets the drive that uses a node use another.
pub(super) fn replace(vm: &Vm, node: &str, by: &str) {
    let users: Vec<String> = (vm.options.block_nodes.iter())
        .map(|known| text(known, "node-name").to_owned())
        .filter(|disk| used_by(vm, disk) == node)
        .collect();
    for disk in users {
        vm.state().disks.drives.insert(disk, by.to_owned());
    }
}

/// Whether a drive uses the node.
pub(super) fn is_used(vm: &Vm, node: &str) -> bool {
    vm.options.block_nodes.iter().any(|known| used_by(vm, text(known, "node-name")) == node)
}

fn used_by(vm: &Vm, disk: &str) -> String {
    vm.state().disks.drives.get(disk).cloned().unwrap_or_else(|| disk.to_owned())
}

fn drives(vm: &Vm) -> Value {
    let drive = |known: &Value| {
        let disk = text(known, "node-name");
        let node = used_by(vm, disk);
        let (path, driver) = image(vm, &node).unwrap_or_default();
        json!({
            "device": "",
            "qdev": format!("/machine/peripheral/{disk}-device/virtio-backend"),
            "io-status": "ok",
            "inserted": {
                "node-name": node, "drv": driver, "ro": known["read-only"],
                "image": { "virtual-size": virtual_size(&path, &driver) },
            },
        })
    };
    vm.options.block_nodes.iter().map(drive).collect()
}

fn statistics(vm: &Vm) -> Value {
    let drive = |known: &Value| {
        let device =
            format!("/machine/peripheral/{}-device/virtio-backend", text(known, "node-name"));
        let written = vm.faults.setting("written-bytes", 0);
        json!({ "qdev": device, "stats": { "wr_bytes": written, "wr_operations": written / 4096 } })
    };
    vm.options.block_nodes.iter().map(drive).collect()
}

fn nodes(vm: &Vm) -> Value {
    let state = vm.state();
    let known = vm.options.block_nodes.iter().map(|node| text(node, "node-name"));
    let there = known.filter(|name| !state.disks.removed.iter().any(|removed| removed == name));
    let all = there.chain(state.disks.nodes.keys().map(String::as_str));
    all.map(|name| json!({ "node-name": name })).collect()
}

fn exports(vm: &Vm) -> Value {
    let state = vm.state();
    let export = |(id, (node, _)): (&String, &(String, watch::Sender<()>))| json!({ "id": id, "type": "nbd", "node-name": node, "shutting-down": false });
    state.disks.exports.iter().map(export).collect()
}

/// Whether somebody else may write to a disk.
pub(super) fn serves(vm: &Vm) -> bool {
    !vm.state().disks.exports.is_empty()
}

fn export(vm: &Vm, arguments: &Value) -> Done {
    let (id, node) = (text(arguments, "id"), text(arguments, "node-name"));
    if image(vm, node).is_none() {
        return Err(format!("Cannot find device='' nor node-name='{node}'"));
    }
    let mut state = vm.state();
    if state.disks.server.is_none() {
        return Err("NBD server not running".to_owned());
    }
    if state.disks.exports.contains_key(id) {
        return Err(format!("Block export id '{id}' is already in use"));
    }
    state.disks.exports.insert(id.to_owned(), (node.to_owned(), watch::channel(()).0));
    Ok(json!({}))
}

fn stop_serving(vm: &Vm) -> Done {
    let mut state = vm.state();
    state.disks.exports.clear();
    match state.disks.server.take() {
        Some(_) => Ok(json!({})),
        None => Err("NBD server not running".to_owned()),
    }
}

async fn serve(vm: &Arc<Vm>, arguments: &Value) -> Done {
    if vm.state().disks.server.is_some() {
        return Err("NBD server already running".to_owned());
    }
    let data = &arguments["addr"]["data"];
    let address = format!("{}:{}", text(data, "host"), text(data, "port"));
    let listener = TcpListener::bind(&address).await;
    let listener = listener.map_err(|error| format!("Failed to bind socket: {error}"))?;
    let (running, mut ended) = watch::channel(());
    vm.state().disks.server = Some(running);
    let (vm, credentials) = (Arc::clone(vm), arguments.clone());
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = ended.changed() => return,
                accepted = listener.accept() => {
                    let Ok((stream, _)) = accepted else { continue };
                    let (vm, credentials) = (Arc::clone(&vm), credentials.clone());
                    // A client that breaks off is no error of the server.
                    tokio::spawn(async move { answer(&vm, &credentials, stream).await });
                }
            }
        }
    });
    Ok(json!({}))
}

/// Serves one client until either end has enough.
async fn answer(vm: &Vm, credentials: &Value, stream: TcpStream) -> std::io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut lines = BufReader::new(reader).lines();
    let hello = lines.next_line().await?.unwrap_or_default();
    let hello: Value = serde_json::from_str(&hello).unwrap_or_default();
    let welcome = welcome(vm, credentials, &hello);
    let line =
        welcome.as_ref().map_or_else(|why| json!({ "error": why }), |(line, ..)| line.clone());
    writer.write_all(format!("{line}\n").as_bytes()).await?;
    let Ok((_, (path, driver), mut ended)) = welcome else { return Ok(()) };
    loop {
        let line = tokio::select! {
            _ = ended.changed() => return Ok(()),
            line = lines.next_line() => line?,
        };
        let Some(line) = line else { return Ok(()) };
        let request: Value = serde_json::from_str(&line).unwrap_or_default();
        if text(&request, "driver") == driver {
            std::fs::copy(text(&request, "copied"), &path)?;
        }
        writer.write_all(b"{}\n").await?;
    }
}

type Welcome = (Value, (PathBuf, String), watch::Receiver<()>);

/// Lets a client in or not.
fn welcome(vm: &Vm, credentials: &Value, hello: &Value) -> Result<Welcome, String> {
    let of = |key: &str| vm.state().objects.get(text(credentials, key)).cloned();
    let own = match (of("tls-creds"), hello["tls"].is_null()) {
        (None, true) => Value::Null,
        (Some(own), false) => {
            let identity = of("tls-authz").map(|object| object["identity"].clone());
            tls::let_in(&own["dir"], identity.as_ref(), &hello["tls"])?
        }
        _ => return Err("TLS negotiation required before option 7 (go)".to_owned()),
    };
    let exported = {
        let state = vm.state();
        let found = state.disks.exports.get(text(hello, "export"));
        found.map(|(node, ended)| (node.clone(), ended.subscribe()))
    };
    let (node, ended) = exported.ok_or("Requested export not available")?;
    let (path, driver) = image(vm, &node).ok_or("Requested export not available")?;
    Ok((json!({ "size": virtual_size(&path, &driver), "tls": own }), (path, driver), ended))
}

async fn add(vm: &Arc<Vm>, options: &Value) -> Done {
    let name = text(options, "node-name");
    if name.len() > 31 {
        return Err("Node name too long".to_owned());
    }
    if image(vm, name).is_some() || vm.state().disks.nodes.contains_key(name) {
        return Err(format!("Duplicate nodes with node-name='{name}'"));
    }
    let node = if text(options, "driver") == "nbd" {
        let connection = Some(connect(vm, options).await?);
        Node::Remote { connection, yanked: false }
    } else {
        let path = PathBuf::from(text(&options["file"], "filename"));
        let opened = std::fs::File::open(&path);
        opened.map_err(|error| format!("Could not open '{}': {error}", path.display()))?;
        Node::Image { path, driver: text(options, "driver").to_owned() }
    };
    vm.state().disks.nodes.insert(name.to_owned(), node);
    Ok(json!({}))
}

/// Flushes, and therefore connects anew where the connection is lost.
async fn reopen(vm: &Arc<Vm>, options: &Value) -> Done {
    let name = text(options, "node-name");
    match vm.state().disks.nodes.get(name) {
        None => return Err(format!("Failed to find node with node-name='{name}'")),
        Some(Node::Remote { yanked: true, .. }) => {
            return Err("Error flushing drive: Input/output error".to_owned());
        }
        Some(_) => {}
    }
    if reachable(vm, name) {
        return Ok(json!({}));
    }
    let made = connect(vm, options).await;
    let made = made.map_err(|_| "Error flushing drive: Input/output error".to_owned())?;
    if let Some(Node::Remote { connection, .. }) = vm.state().disks.nodes.get_mut(name) {
        *connection = Some(made);
    }
    Ok(json!({}))
}

fn remove(vm: &Vm, name: &str) -> Done {
    let added = vm.state().disks.nodes.contains_key(name);
    if !added && image(vm, name).is_none() {
        return Err(format!("Failed to find node with node-name='{name}'"));
    }
    if is_used(vm, name) || mirroring::uses(vm, name) {
        return Err(format!("Node {name} is in use"));
    }
    let mut state = vm.state();
    if state.disks.nodes.remove(name).is_none() {
        state.disks.removed.push(name.to_owned());
    }
    Ok(json!({}))
}

fn yank(vm: &Vm, name: &str) -> Done {
    match vm.state().disks.nodes.get_mut(name) {
        Some(Node::Remote { connection, yanked, .. }) => {
            *connection = None;
            *yanked = true;
            Ok(json!({}))
        }
        _ => Err("Instance not found".to_owned()),
    }
}

fn put_on(vm: &Vm, arguments: &Value) -> Done {
    let actions = arguments["actions"].as_array().map(Vec::as_slice).unwrap_or_default();
    for action in actions {
        let data = &action["data"];
        let (node, overlay) = (text(data, "node"), text(data, "overlay"));
        if !is_used(vm, node) || image(vm, overlay).is_none() || is_used(vm, overlay) {
            return Err(format!("Cannot find device='' nor node-name='{overlay}'"));
        }
    }
    for action in actions {
        replace(vm, text(&action["data"], "node"), text(&action["data"], "overlay"));
    }
    Ok(json!({}))
}

/// Connects to an export as the options say.
async fn connect(vm: &Arc<Vm>, options: &Value) -> Result<Connection, String> {
    let server = &options["server"];
    let address = format!("{}:{}", text(server, "host"), text(server, "port"));
    let address: SocketAddr = address.parse().map_err(|_| "invalid address".to_owned())?;
    let failed = |error: std::io::Error| format!("Failed to connect to '{address}': {error}");
    let (reader, mut writer) = TcpStream::connect(address).await.map_err(failed)?.into_split();
    let own = {
        let state = vm.state();
        let credentials = state.objects.get(text(options, "tls-creds"));
        tls::of_client(credentials.map(|object| &object["dir"]), &options["tls-hostname"])
    };
    let hello = json!({ "export": options["export"], "tls": own });
    writer.write_all(format!("{hello}\n").as_bytes()).await.map_err(failed)?;
    let mut lines = BufReader::new(reader).lines();
    let line = lines.next_line().await.map_err(failed)?.ok_or("Failed to read data")?;
    let welcome: Value = serde_json::from_str(&line).unwrap_or_default();
    if let Some(error) = welcome["error"].as_str() {
        return Err(error.to_owned());
    }
    if !own.is_null() {
        tls::check_server(&welcome, &own)?;
    }
    let (requests, received) = mpsc::channel(REQUESTS_MAX);
    let (living, alive) = watch::channel(true);
    tokio::spawn(async move {
        // However it ends, it is lost.
        let _ = converse(lines, writer, received).await;
        living.send_replace(false);
    });
    Ok(Connection { requests, alive, size: welcome["size"].as_u64().unwrap_or(0) })
}

/// Sends requests until the connection, or the one who has them, ends.
async fn converse(
    mut lines: Lines<BufReader<OwnedReadHalf>>,
    mut writer: OwnedWriteHalf,
    mut requests: mpsc::Receiver<Request>,
) -> std::io::Result<()> {
    loop {
        tokio::select! {
            request = requests.recv() => {
                let Some((request, answered)) = request else { return Ok(()) };
                writer.write_all(format!("{request}\n").as_bytes()).await?;
                if lines.next_line().await?.is_none() {
                    return Ok(());
                }
                // Who asked may have given up.
                let _ = answered.send(());
            }
            line = lines.next_line() => if line?.is_none() { return Ok(()) },
        }
    }
}
