-- Version 1 of the outbox.
create table ledgerline.mail_outbox (
    message_id text primary key,
    dag_id text not null,
    run_id text not null,
    kind text not null,
    sender text not null,
    recipients text[] not null,
    subject text not null,
    message bytea not null,
    state text not null default 'waiting' check (state in ('waiting', 'sent', 'refused')),
    recorded_at timestamptz not null,
    sent_at timestamptz,
    tries integer not null default 0,
    next_try_at timestamptz not null,
    error text
);

create index mail_outbox_waiting on ledgerline.mail_outbox (recorded_at) where state = 'waiting';
create index mail_outbox_recorded_at on ledgerline.mail_outbox (recorded_at);

create table ledgerline.mail_alarm (
    dag_id text not null,
    task_id text not null,
    failing_since timestamptz not null,
    last_mail_at timestamptz not null,
    failures integer not null,
    held integer not null,
    last_heard text not null,
    primary key (dag_id, task_id)
);
