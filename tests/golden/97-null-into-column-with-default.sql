-- a NULL in a column with a DEFAULT stays NULL
INSERT INTO all_types(id,c_def) VALUES (200,NULL);
