use std::pin::Pin;
use std::task::{Context, Waker};
use std::time::Duration;

use super::*;

fn is_pending(future: Pin<&mut impl Future>) -> bool {
    let mut context = Context::from_waker(Waker::noop());
    future.poll(&mut context).is_pending()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

#[test]
fn no_more_enter_than_the_limit_whatever_worker_they_come_by() {
    let in_flight = InFlight::new(2);
    assert!(in_flight.try_enter(0, 2));
    assert!(in_flight.try_enter(1, 2));
    assert!(!in_flight.try_enter(0, 2));
    assert!(!in_flight.try_enter(1, 2));
    in_flight.leave(0);
    assert!(in_flight.try_enter(1, 2));
    assert_eq!((in_flight.of_worker(0), in_flight.of_worker(1)), (0, 2));
    assert_eq!(in_flight.total(), 2);
}

#[test]
fn without_a_limit_all_enter() {
    let in_flight = InFlight::new(1);
    assert!((0..1000).all(|_| in_flight.try_enter(0, 0)));
}

#[test]
fn workers_that_race_never_exceed_the_limit() {
    const LIMIT: u32 = 2;
    let in_flight = InFlight::new(4);
    let most = std::sync::atomic::AtomicU64::new(0);
    let inside = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let (in_flight, most, inside) = (&in_flight, &most, &inside);
            scope.spawn(move || {
                for _ in 0..20_000 {
                    if in_flight.try_enter(worker, LIMIT) {
                        let now = inside.fetch_add(1, Ordering::SeqCst) + 1;
                        most.fetch_max(now, Ordering::SeqCst);
                        inside.fetch_sub(1, Ordering::SeqCst);
                        in_flight.leave(worker);
                    }
                }
            });
        }
    });
    assert!(most.into_inner() <= u64::from(LIMIT));
    assert_eq!(in_flight.total(), 0);
}

#[test]
fn a_queue_holds_its_capacity() {
    let queue = Arc::new(Queue::default());
    let first = queue.join(2);
    let second = queue.join(2);
    assert!(first.is_some() && second.is_some());
    assert!(queue.join(2).is_none());
    drop(first);
    assert!(queue.join(2).is_some());
    assert!(queue.join(0).is_none());
}

#[tokio::test]
async fn who_leaves_wakes_the_first_of_each_queue() {
    let in_flight = Arc::new(InFlight::new(2));
    assert!(in_flight.try_enter(0, 1));
    let queues = [Arc::new(Queue::default()), Arc::new(Queue::default())];
    let mut waiting = Vec::new();
    for queue in &queues {
        in_flight.wakes(queue);
        in_flight.wakes(queue);
        waiting.push(queue.join(8).unwrap());
    }
    // By another thread, as another worker would.
    let leaver = Arc::clone(&in_flight);
    std::thread::spawn(move || leaver.leave(0)).join().unwrap();
    for place in &waiting {
        assert!(place.room(soon()).await);
    }
    assert!(in_flight.try_enter(1, 1));
    drop(waiting);
    assert!(queues.iter().all(|queue| queue.is_empty()));
}

#[tokio::test]
async fn those_who_wait_are_served_in_order() {
    let in_flight = InFlight::new(1);
    let queue = Arc::new(Queue::default());
    in_flight.wakes(&queue);
    assert!(in_flight.try_enter(0, 1));
    let places = [queue.join(8).unwrap(), queue.join(8).unwrap()];
    let (mut first, mut second) = (
        std::pin::pin!(places[0].room(soon())),
        std::pin::pin!(places[1].room(soon())),
    );
    assert!(is_pending(first.as_mut()));
    assert!(is_pending(second.as_mut()));
    in_flight.leave(0);
    assert!(is_pending(second.as_mut()));
    assert!(first.await);
    assert!(is_pending(second.as_mut()));
    queue.wake_all();
    assert!(second.await);
}

#[tokio::test(start_paused = true)]
async fn who_waits_too_long_is_told() {
    let queue = Arc::new(Queue::default());
    let place = queue.join(1).unwrap();
    assert!(!place.room(soon()).await);
    drop(place);
    assert!(queue.is_empty());
}

#[test]
fn a_queue_that_is_gone_is_forgotten() {
    let in_flight = InFlight::new(1);
    for _ in 0..100 {
        in_flight.wakes(&Arc::new(Queue::default()));
    }
    assert_eq!(in_flight.queues.load().len(), 1);
}
