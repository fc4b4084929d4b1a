//! `services`: where everything is, for psql, kcat, aws, DuckDB or a notebook.

use crate::{
    bank,
    cli::Output,
    config::Loaded,
    dag::Schedule,
    exit::{Exit, Failure},
    pipeline::{
        Mode, Parts, Pipeline, data_dir,
        services::{Needs, Printed},
        socket::Client,
    },
};

pub(super) async fn services(loaded: &Loaded, output: Output) -> Result<Exit, Failure> {
    let root = loaded.data_dir();
    if let Some(mut owner) = Client::connect(&data_dir::socket_path(&root)).await {
        let printed = owner.services().await.map_err(|error| Failure::new(Exit::Away, format!("the running pipeline does not answer: {error}")))?;
        print(&printed, &output)?;
        return Ok(Exit::Right);
    }
    let interrupted = super::interrupts();
    let data_dir = super::take_data_dir(&root)?;
    let services = super::start_services(loaded, &data_dir, Needs { dbt: false, ..Needs::ALL }, &super::Limits::of(&interrupted)).await?;
    let printed = services.printed();
    // A pipeline without stages: it answers for the data dir, so that single commands find these services.
    let mode = Mode { goal: bank::Goal::Forever, rate: bank::Rate::default(), schedule: Schedule::Never };
    let pipeline = Pipeline::start(loaded, data_dir, services, Parts::NONE, mode).await.map_err(|error| Failure::from_error(&error))?;
    let printed = print(&printed, &output);
    if printed.is_ok() {
        super::tell("The services run until ^C.");
        interrupted.cancelled().await;
    }
    pipeline.stop().await;
    printed.map(|()| Exit::Interrupted)
}

fn print(printed: &Printed, output: &Output) -> Result<(), Failure> {
    if output.json {
        return super::print_json(printed);
    }
    let s3 = &printed.s3;
    super::print(&format!(
        "source     {}\nwarehouse  {}\nstate      {}\nkafka      {}\ns3         {} bucket {} region {}\n           AWS_ACCESS_KEY_ID={} AWS_SECRET_ACCESS_KEY={}\n",
        printed.source, printed.warehouse, printed.state, printed.kafka, s3.endpoint, s3.bucket, s3.region, s3.access_key_id, s3.secret_access_key
    ))
}
