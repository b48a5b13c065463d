//! The session's rules against a scripted peer.

use std::io::Read;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

use super::*;
use crate::event::{EventError, EventKind};

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "P"}, "capabilities": ["oob"]}}"#;

/// The other end, driven line by line by the test.
struct Peer {
    stream: BufReader<UnixStream>,
}

impl Peer {
    /// A session whose handshake is done.
    async fn greeted() -> (Qmp, Self) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut peer = Self { stream: BufReader::new(theirs) };
        peer.say(GREETING).await;
        let (qmp, ()) = tokio::join!(Qmp::over(ours), async {
            let hello = peer.hear().await;
            assert_eq!(hello["execute"], "qmp_capabilities");
            assert_eq!(hello["arguments"], json!({"enable": ["oob"]}));
            peer.answer(&hello, json!({})).await;
        });
        (qmp.unwrap(), peer)
    }

    async fn say(&mut self, line: &str) {
        let line = format!("{line}\r\n");
        self.stream.get_mut().write_all(line.as_bytes()).await.unwrap();
    }

    async fn answer(&mut self, command: &Value, value: Value) {
        self.say(&json!({"return": value, "id": command["id"]}).to_string()).await;
    }

    async fn hear(&mut self) -> Value {
        let mut line = String::new();
        let read = self.stream.read_line(&mut line);
        let read = tokio::time::timeout(Duration::from_secs(20), read).await;
        assert!(read.expect("nothing was said").unwrap() > 0, "the session was closed");
        serde_json::from_str(&line).unwrap()
    }
}

#[tokio::test]
async fn greeting_and_answer() {
    let (qmp, mut peer) = Peer::greeted().await;
    assert_eq!(qmp.greeting().version, (10, 0, 2));
    assert_eq!(qmp.greeting().package, "P");
    assert_eq!(qmp.greeting().peer_pid, Some(std::process::id()));
    let (answer, ()) = tokio::join!(qmp.execute("query-x", json!({"a": 1})), async {
        let command = peer.hear().await;
        assert_eq!(command["execute"], "query-x");
        assert_eq!(command["arguments"], json!({"a": 1}));
        peer.answer(&command, json!({"b": 2})).await;
    });
    assert_eq!(answer.unwrap(), json!({"b": 2}));
}

#[tokio::test]
async fn answers_find_their_commands_in_any_order() {
    let (qmp, mut peer) = Peer::greeted().await;
    let (first, second, ()) =
        tokio::join!(qmp.execute("one", Value::Null), qmp.execute("two", Value::Null), async {
            let one = peer.hear().await;
            let two = peer.hear().await;
            assert!(one.get("arguments").is_none());
            let text = json!({"error": {"class": "DeviceNotFound", "desc": "no"}, "id": two["id"]});
            peer.say(&text.to_string()).await;
            peer.answer(&one, json!(1)).await;
        });
    assert_eq!(first.unwrap(), json!(1));
    match second.unwrap_err() {
        QmpError::Refused { command, class, description } => {
            assert_eq!((command.as_str(), description.as_str()), ("two", "no"));
            assert_eq!(class, RefusalClass::DeviceNotFound);
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_given_up_command_is_still_sent_whole_and_its_late_answer_dropped() {
    let (qmp, mut peer) = Peer::greeted().await;
    let big = "x".repeat(1 << 20);
    let given_up = qmp.execute("slow", json!({"big": big}));
    assert!(tokio::time::timeout(Duration::from_millis(20), given_up).await.is_err());
    let (answer, ()) = tokio::join!(qmp.execute("next", Value::Null), async {
        let slow = peer.hear().await;
        assert_eq!(slow["arguments"]["big"].as_str().unwrap().len(), 1 << 20);
        let next = peer.hear().await;
        peer.answer(&slow, json!("late")).await;
        peer.answer(&next, json!("in time")).await;
    });
    assert_eq!(answer.unwrap(), json!("in time"));
}

#[tokio::test(start_paused = true)]
async fn no_answer_is_a_timeout_that_leaves_the_session_whole() {
    let (qmp, mut peer) = Peer::greeted().await;
    let error = qmp.execute("query-x", Value::Null).await.unwrap_err();
    assert!(
        matches!(&error, QmpError::TimedOut { command, after }
            if command == "query-x" && after.as_secs() == COMMAND_TIMEOUT_SECONDS),
        "{error:?}"
    );
    let abandoned = peer.hear().await;
    tokio::time::resume();
    let (answer, ()) = tokio::join!(qmp.execute("query-y", Value::Null), async {
        peer.answer(&abandoned, json!(1)).await;
        let command = peer.hear().await;
        peer.answer(&command, json!(2)).await;
    });
    assert_eq!(answer.unwrap(), json!(2));
}

#[tokio::test]
async fn the_end_of_the_session_answers_every_command() {
    let (qmp, mut peer) = Peer::greeted().await;
    let mut events = qmp.events();
    let waiting = {
        let qmp = qmp.clone();
        tokio::spawn(async move { qmp.execute("query-x", Value::Null).await })
    };
    peer.hear().await;
    drop(peer);
    let error = waiting.await.unwrap().unwrap_err();
    assert!(error.is_disconnected(), "{error:?}");
    assert!(qmp.execute("query-y", Value::Null).await.unwrap_err().is_disconnected());
    assert_eq!(events.next().await.unwrap_err(), EventError::Closed);
    assert_eq!(qmp.events().next().await.unwrap_err(), EventError::Closed);
    qmp.wait_ended().await;
}

#[tokio::test]
async fn in_band_commands_leave_room_for_out_of_band_ones() {
    // QEMU (7.2, 10.0) stops reading at 8.
    const { assert!(IN_BAND_IN_FLIGHT_MAX < 8) };
    let (qmp, mut peer) = Peer::greeted().await;
    let mut in_band = Vec::new();
    for _ in 0..IN_BAND_IN_FLIGHT_MAX + 1 {
        let qmp = qmp.clone();
        in_band.push(tokio::spawn(async move { qmp.execute("slow", Value::Null).await }));
    }
    let mut heard = Vec::new();
    for _ in 0..IN_BAND_IN_FLIGHT_MAX {
        heard.push(peer.hear().await);
    }
    // Giving up does not make room: QEMU still works on it.
    in_band[0].abort();
    let (answer, ()) = tokio::join!(qmp.execute_oob("migrate-pause", Value::Null), async {
        let command = peer.hear().await;
        assert_eq!(command["exec-oob"], "migrate-pause");
        peer.answer(&command, json!({})).await;
    });
    answer.unwrap();
    peer.answer(&heard[0], json!({})).await;
    assert_eq!(peer.hear().await["execute"], "slow");
}

#[tokio::test]
async fn events_are_told_to_all_readers_and_a_slow_one_learns_that_it_lags() {
    let (qmp, mut peer) = Peer::greeted().await;
    let (mut quick, mut slow) = (qmp.events(), qmp.events());
    let event = r#"{"event": "STOP", "timestamp": {"seconds": 5, "microseconds": 6}}"#;
    peer.say(event).await;
    let stop = quick.next().await.unwrap();
    assert_eq!((stop.kind, stop.at.as_micros()), (EventKind::Stop, 5_000_006));
    for _ in 0..EVENTS_KEPT_MAX {
        peer.say(event).await;
        quick.next().await.unwrap();
    }
    assert_eq!(slow.next().await.unwrap_err(), EventError::Lagged { missed: 1 });
    assert_eq!(slow.next().await.unwrap().kind, EventKind::Stop);
}

#[tokio::test]
async fn unusable_lines_end_the_session_and_are_named() {
    type Ending = (Vec<u8>, fn(&SessionEnd) -> bool);
    let endings: [Ending; 4] = [
        (b"no json\n".to_vec(), |end| matches!(end, SessionEnd::NotJson { .. })),
        (b"[1]\n".to_vec(), |end| matches!(end, SessionEnd::NotJson { .. })),
        ([b"[".repeat(100_000), b"\n".to_vec()].concat(), |end| {
            matches!(end, SessionEnd::NotJson { .. })
        }),
        (vec![b'x'; LINE_BYTES_MAX + 1], |end| matches!(end, SessionEnd::LineTooLong { .. })),
    ];
    for (line, expected) in endings {
        let (qmp, mut peer) = Peer::greeted().await;
        let saying = tokio::spawn(async move {
            // The session may close before all of an oversized line is taken.
            let _ = peer.stream.get_mut().write_all(&line).await;
            peer
        });
        let end = qmp.wait_ended().await;
        assert!(expected(&end), "{end:?}");
        let mut peer = saying.await.unwrap();
        // While a handle lives, too: QEMU would greet nobody else.
        let mut rest = Vec::new();
        let closed =
            tokio::time::timeout(Duration::from_secs(5), peer.stream.read_to_end(&mut rest)).await;
        assert!(closed.is_ok(), "the session is over, and its socket is open");
        drop(qmp);
    }
}

#[tokio::test]
async fn objects_that_are_not_understood_are_passed_over() {
    let (qmp, mut peer) = Peer::greeted().await;
    let (answer, ()) = tokio::join!(qmp.execute("query-x", Value::Null), async {
        let command = peer.hear().await;
        for line in [
            r#"{"news": 1}"#,
            r#"{"return": 1}"#,
            r#"{"error": {"desc": "no id"}}"#,
            r#"{"return": 1, "id": 999}"#,
            r#"{"return": 1, "id": "text"}"#,
        ] {
            peer.say(line).await;
        }
        peer.answer(&command, json!("right")).await;
    });
    assert_eq!(answer.unwrap(), json!("right"));
}

#[tokio::test]
async fn a_descriptor_travels_with_its_command() {
    let (qmp, peer) = Peer::greeted().await;
    let (mut tail, head) = std::io::pipe().unwrap();
    let (answer, peer) = tokio::join!(
        qmp.execute_with_descriptor("getfd", json!({"fdname": "x"}), head.into()),
        async {
            let stream = peer.stream.into_inner();
            let (line, descriptor) =
                stream.async_io(tokio::io::Interest::READABLE, || receive(&stream)).await.unwrap();
            let command: Value = serde_json::from_slice(&line).unwrap();
            assert_eq!(command["execute"], "getfd");
            let mut head = std::io::PipeWriter::from(descriptor);
            std::io::Write::write_all(&mut head, b"hello").unwrap();
            drop(head);
            let mut peer = Peer { stream: BufReader::new(stream) };
            peer.answer(&command, json!({})).await;
            peer
        }
    );
    answer.unwrap();
    let mut text = String::new();
    tail.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
    drop(peer);
}

fn receive(stream: &UnixStream) -> std::io::Result<(Vec<u8>, OwnedFd)> {
    let mut bytes = vec![0; 4096];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = rustix::net::recvmsg(
        stream,
        &mut [std::io::IoSliceMut::new(&mut bytes)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    bytes.truncate(message.bytes);
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok((bytes, descriptor.expect("no descriptor came")))
}

#[tokio::test]
async fn connecting_waits_for_a_socket_but_not_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let error = Qmp::connect(&path, Duration::from_millis(20)).await.unwrap_err();
    assert!(matches!(error, ConnectError::NobodyListens { .. }), "{error:?}");

    // Listens, but never greets: QEMU does so while another client is connected.
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let error = Qmp::connect(&path, Duration::from_millis(20)).await.unwrap_err();
    assert!(matches!(error, ConnectError::NoGreeting { .. }), "{error:?}");

    drop(listener);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "").unwrap();
    let error = Qmp::connect(&path, Duration::from_millis(20)).await.unwrap_err();
    assert!(matches!(error, ConnectError::NobodyListens { .. }), "{error:?}");
}

#[tokio::test]
async fn what_does_not_greet_like_qemu_is_refused() {
    for line in [r#"{"hello": 1}"#, "SSH-2.0-x"] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut peer = Peer { stream: BufReader::new(theirs) };
        peer.say(line).await;
        let error = Qmp::over(ours).await.unwrap_err();
        assert!(matches!(error, ConnectError::Greeting(_)), "{error:?}");
    }
}
