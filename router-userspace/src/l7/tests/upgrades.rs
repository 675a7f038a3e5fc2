//! Connections that leave HTTP.

use super::*;

const UPGRADE: &str = "GET /chat HTTP/1.1\r\nHost: a.com\r\nConnection: Upgrade\r\n\
                       Upgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n";
const SWITCH: &str =
    "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";

#[tokio::test]
async fn bytes_sent_ahead_by_either_side_are_not_lost() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let mut client = gateway.connect().await;
    client
        .write_all(format!("{UPGRADE}early client").as_bytes())
        .await
        .unwrap();

    let (mut stream, _) = listener.accept().await.unwrap();
    let head = read_until(&mut stream, "\r\n\r\n").await;
    assert!(head.contains("\r\nupgrade: websocket\r\n"), "{head}");
    assert!(head.contains("\r\nconnection: upgrade\r\n"), "{head}");
    stream
        .write_all(format!("{SWITCH}early backend").as_bytes())
        .await
        .unwrap();
    read_until(&mut stream, "early client").await;

    let response = read_until(&mut client, "early backend").await;
    assert_status(&response, 101);
    assert!(
        response.contains("\r\nconnection: upgrade\r\n"),
        "{response}"
    );
    assert!(
        response.contains("\r\nupgrade: websocket\r\n"),
        "{response}"
    );

    client.write_all(b"ping").await.unwrap();
    read_until(&mut stream, "ping").await;
    stream.write_all(b"pong").await.unwrap();
    read_until(&mut client, "pong").await;

    let open = gateway.totals(|totals| totals.upgrades_open == 1).await;
    assert_eq!((open.upgrades, open.requests_in_flight), (1, 1));
    drop(client);
    assert_eq!(read_to_end(&mut stream).await, "");
    drop(stream);
    let ended = gateway.totals(|totals| totals.upgrades_open == 0).await;
    assert_eq!((ended.requests_in_flight, ended.responses[0]), (0, 1));
}

#[tokio::test]
async fn one_side_may_end_before_the_other() {
    let (listener, address) = scripted().await;
    let gateway = Gateway::to([address]);
    let mut client = gateway.connect().await;
    client.write_all(UPGRADE.as_bytes()).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    read_until(&mut stream, "\r\n\r\n").await;
    stream.write_all(SWITCH.as_bytes()).await.unwrap();
    read_until(&mut client, "\r\n\r\n").await;
    client.write_all(b"last words").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut stream).await, "last words");
    stream.write_all(b"answer").await.unwrap();
    drop(stream);
    assert_eq!(read_to_end(&mut client).await, "answer");
}

#[tokio::test]
async fn without_a_101_the_next_bytes_are_the_next_request() {
    let refuses =
        TestBackend::answering(|_| Response::builder().status(403).body(full("no")).unwrap()).await;
    let gateway = Gateway::to([refuses.address]);
    let mut client = gateway.connect().await;
    client.write_all(UPGRADE.as_bytes()).await.unwrap();
    assert_status(&read_until(&mut client, "no").await, 403);
    client
        .write_all(b"GET /next HTTP/1.1\r\nHost: a.com\r\n\r\n")
        .await
        .unwrap();
    assert_status(&read_until(&mut client, "no").await, 403);
    assert_eq!(refuses.seen(), ["GET /chat", "GET /next"]);
    assert_eq!(refuses.connections(), 1);
}

#[tokio::test]
async fn an_upgrade_is_not_cut_by_the_timeouts_of_http() {
    let (listener, address) = scripted().await;
    let mut config = config();
    let short = Duration::from_millis(20);
    config.timeouts.body_idle = short;
    config.timeouts.idle = short;
    config.timeouts.request_headers = short;
    config.timeouts.backend_idle = short;
    let gateway = Gateway::with_config(snapshot([("a.com", pool([backend(address)]))]), config);
    let mut client = gateway.connect().await;
    client.write_all(UPGRADE.as_bytes()).await.unwrap();
    let (mut stream, _) = listener.accept().await.unwrap();
    read_until(&mut stream, "\r\n\r\n").await;
    stream.write_all(SWITCH.as_bytes()).await.unwrap();
    read_until(&mut client, "\r\n\r\n").await;
    // The timeouts have run out when a connection that began later has been cut by them.
    assert_eq!(gateway.exchange("").await, "");
    gateway
        .totals(|totals| totals.connections_timed_out == 1)
        .await;
    client.write_all(b"still here").await.unwrap();
    read_until(&mut stream, "still here").await;
}
