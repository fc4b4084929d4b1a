-- Version 2 of the outbox: which recipients have a letter, and which the server refused for good (`address: why`).
alter table ledgerline.mail_outbox
    add column reached text[] not null default '{}',
    add column refusals text[] not null default '{}';
