-- Version 1 of the run history. Names as in Airflow's metadata database, where it has the thing.
create table ledgerline.dag (
    dag_id text primary key,
    is_paused boolean not null default false
);

create table ledgerline.dag_run (
    dag_id text not null,
    run_id text not null,
    run_number bigint generated always as identity unique,
    run_type text not null check (run_type in ('scheduled', 'manual', 'triggered')),
    logical_date timestamptz not null,
    state text not null check (state in ('queued', 'running', 'success', 'failed')),
    queued_at timestamptz not null,
    start_date timestamptz,
    end_date timestamptz,
    triggering_dag_id text,
    triggering_run_id text,
    cancelled boolean not null default false,
    reported boolean not null default false,
    primary key (dag_id, run_id)
);

create table ledgerline.task_instance (
    dag_id text not null,
    run_id text not null,
    task_id text not null,
    place integer not null,
    state text not null,
    try_number integer not null,
    max_tries integer not null,
    interruptions integer not null,
    start_date timestamptz,
    end_date timestamptz,
    retry_at timestamptz,
    error text,
    fault text,
    note jsonb,
    primary key (dag_id, run_id, task_id),
    foreign key (dag_id, run_id) references ledgerline.dag_run on delete cascade
);

create table ledgerline.task_try (
    dag_id text not null,
    run_id text not null,
    task_id text not null,
    try_number integer not null,
    state text not null check (state in ('running', 'success', 'failed', 'skipped')),
    start_date timestamptz not null,
    end_date timestamptz,
    error text,
    primary key (dag_id, run_id, task_id, try_number),
    foreign key (dag_id, run_id, task_id) references ledgerline.task_instance on delete cascade
);

create table ledgerline.task_log (
    dag_id text not null,
    run_id text not null,
    task_id text not null,
    try_number integer not null,
    line_number integer not null,
    at timestamptz not null,
    line text not null,
    primary key (dag_id, run_id, task_id, try_number, line_number),
    foreign key (dag_id, run_id, task_id, try_number) references ledgerline.task_try on delete cascade
);
