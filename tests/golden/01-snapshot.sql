-- rows that were in the tables before the connector started: op r
INSERT INTO customers(first_name,last_name,email,date_of_birth,profile,created_at,updated_at) VALUES
 ('Ada','Lovelace','ada@example.com','1815-12-10','{"tier": "gold", "n": 1.50}','2026-01-02 03:04:05.678901+00','2026-01-02 03:04:05.678901'),
 ('Žofie','Novák',NULL,NULL,NULL,'2026-01-02 03:04:05+02',NULL);
INSERT INTO accounts VALUES (1,1,'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11','checking','EUR',1234.50,'2026-01-03','2026-01-03 10:00:00.5+00');
INSERT INTO transactions VALUES (1,1,100.00,'posted','transfer','a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a12','opening',ARRAY['x','y'],'{"k":[1,2]}','2026-01-03 10:00:00+00','2026-01-03 10:00:00');
INSERT INTO ledger_entries VALUES (1,1,1,100.00,NULL),(1,2,1,NULL,100.00);
INSERT INTO evolve VALUES (1,1,'one'),(2,2,'two');
INSERT INTO trunc_me VALUES (1,'a'),(2,'b');
