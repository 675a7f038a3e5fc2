use std::sync::Arc;

use super::*;
use crate::config::HttpConfig;
use crate::l7::Settings;
use crate::l7::tls::Tls;
use crate::snapshot::Published;

fn client() -> ClientState {
    let config = HttpConfig::default();
    let settings = arc_swap::ArcSwap::from_pointee(Settings::new(&config));
    let worker = Worker::new(
        Published::default(),
        Arc::new(settings),
        Arc::default(),
        Tls::start(&config, Arc::default()).unwrap(),
    );
    ClientState::new(&Rc::new(worker), SocketAddr::from(([192, 0, 2, 1], 4000)))
}

/// How long the client's phase has lasted without progress after a second and a read.
async fn idle_after_a_read(client: &ClientState) -> Duration {
    tokio::time::advance(Duration::from_secs(1)).await;
    client.worker.forget_clock();
    client.on_read(1);
    client.worker.now() - client.since.get()
}

#[tokio::test(start_paused = true)]
async fn an_upload_is_progress_also_after_the_response_has_begun() {
    let client = client();
    client.request_begins();
    client.request_is_handed_over(false);
    assert_eq!(idle_after_a_read(&client).await, Duration::ZERO);
    client.response_begins();
    assert_eq!(idle_after_a_read(&client).await, Duration::ZERO);
    // What comes behind the body is another request.
    client.request_body_ended();
    assert_eq!(idle_after_a_read(&client).await, Duration::from_secs(1));
}
