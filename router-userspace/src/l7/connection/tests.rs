use std::sync::Arc;

use super::*;
use crate::config::HttpConfig;
use crate::l7::Settings;
use crate::snapshot::Published;

fn client() -> ClientState {
    let settings = arc_swap::ArcSwap::from_pointee(Settings::new(&HttpConfig::default()));
    let worker = Worker::new(
        0,
        Published::default(),
        Arc::new(settings),
        crate::l7::backend::Backends::new(0, Arc::new(crate::l7::shared::Shared::new(1))),
        Arc::default(),
        None,
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
